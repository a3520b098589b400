"""What can go wrong with a remote model beyond what the protocol names."""

from clvr_jax.backends.protocol import InvalidRequest, Overloaded


class RemoteError(Overloaded):
    """The endpoint gave no usable reply within the allowed tries and time.

    Attributes:
      attempts: tries that were made.
      status: HTTP status of the last one; None where there was no HTTP answer at all, or a
        status of success with an unusable body.
    """

    def __init__(self, message: str, attempts: int = 0, status: int | None = None):
        super().__init__(message)
        self.attempts = attempts
        self.status = status


class BudgetExceeded(RuntimeError):
    """The money or tokens that the config allows would be exceeded; nothing was sent.

    Not an Overloaded: asking again does not help, a larger budget does.
    """


class NotRecorded(InvalidRequest):
    """A replayed transcript lacks this request; the message shows the nearest one it has."""


class Cancelled(Exception):
    """Inside this package: the caller cancelled while nothing was being generated."""
