"""Trying again: what is worth it, when, and for how long."""

import dataclasses
import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import openai

from clvr_jax.backends.protocol import InvalidRequest, TooLong, Usage
from clvr_jax.backends.remote.config import RemoteConfig
from clvr_jax.backends.remote.errors import Cancelled, RemoteError
from clvr_jax.backends.remote.limits import Clock, Pause

T = TypeVar("T")
Verdict = Literal["retry", "too long", "refuse", "give up"]
# what vLLM and SGLang say; OpenAI's own API and launch.serve have a code for it
_TOO_LONG = re.compile(r"(maximum|model's) context (length|window)", re.IGNORECASE)
logger = logging.getLogger(__name__)


class BadReply(Exception):
    """The endpoint answered with success, but not with a reply; `usage` is what it billed."""

    def __init__(self, message: str, usage: Usage | None = None, estimated: bool = False):
        super().__init__(message)
        self.usage = usage
        self.estimated = estimated


class Diverged(BadReply):
    """A stream broke, and its repetition said something else than what was passed on already."""

    def __init__(self, passed_on: int, usage: Usage, estimated: bool):
        message = (
            f"the stream broke after {passed_on} characters, and when it was repeated it did not "
            "begin with them (temperature=0 or a seed makes that less likely)"
        )
        super().__init__(message, usage, estimated)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a try gave no reply.

    Attributes:
      message: in words, the endpoint's own where it gave some.
      verdict: whether to try again, to refuse the request (for its length, or otherwise), or to
        give up although it is fine.
      status: HTTP status; None without an HTTP answer or with one that says success.
      after: seconds that the endpoint asks to wait.
    """

    message: str
    verdict: Verdict
    status: int | None = None
    after: float | None = None


def diagnose(error: Exception) -> Failure | None:
    """Return what an error of one try means; None for errors that are not the endpoint's."""
    if isinstance(error, BadReply):
        return Failure(str(error), "give up" if isinstance(error, Diverged) else "retry")
    if isinstance(error, openai.APIStatusError):
        message = f"HTTP {error.status_code}: {_words(error)}"
        after = retry_after(error.response.headers, time.time())
        verdict = _verdict(error.status_code, error.code, message)
        return Failure(message, verdict, error.status_code, after)
    if isinstance(error, openai.APIConnectionError):
        return Failure(reason_of(error), "retry")
    if isinstance(error, openai.APIError):  # an error inside a stream that began with success
        code = error.code or ""
        status = int(code) if code.isdecimal() else None
        verdict = _verdict(status, code, error.message) if status else "retry"
        return Failure(f"error in the stream: {error.message}", verdict, status)
    return None


def reason_of(error: openai.APIConnectionError) -> str:
    """Return in words why there was no answer."""
    if isinstance(error, openai.APITimeoutError):
        return "timeout, no byte came"
    cause = error.__cause__ or error
    return f"connection failed: {type(cause).__name__}: {cause}"


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a response asks to wait; None if it does not or not readably.

    Args:
      headers: of the response.
      now: Unix time, for the form that gives a date.
    """
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" not in headers:
            return None
        value = headers["retry-after"]
        if value.strip().replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _verdict(status: int, code: str | None, message: str) -> Verdict:
    if code == "insufficient_quota":  # OpenAI's 429 for an empty account
        return "give up"
    if status in (408, 409, 429) or status >= 500:
        return "retry"
    too_long = code == "context_length_exceeded" or _TOO_LONG.search(message)
    return "too long" if too_long else "refuse"


def _words(error: openai.APIStatusError) -> str:
    """The server's message, whichever of the usual places it is in."""
    body = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body
    return str(body or error.message)[:2000]


class Retries:
    """Tries of one turn after the other, with growing, jittered delays between them."""

    def __init__(
        self,
        config: RemoteConfig,
        clock: Clock = time.monotonic,
        pause: Pause = threading.Event.wait,
        draw: Callable[[], float] = random.random,
    ):
        """Take the policy from `config`.

        Args:
          config: its timeouts, delays and number of attempts.
          clock: monotonic seconds.
          pause: how to wait.
          draw: uniform in [0, 1), for the jitter.
        """
        self._config = config
        self._key = config.api_key()
        self._clock = clock
        self._pause = pause
        self._draw = draw

    def run(
        self,
        attempt: Callable[[int, float], T],
        admit: Callable[[], None],
        stop: threading.Event,
    ) -> T:
        """Return what the first successful try returns.

        Args:
          attempt: one try, given its number from 1 and the seconds that are left for it.
          admit: called before each try; waits for rate limits.
          stop: ends the tries between two of them.

        Raises:
          InvalidRequest: the endpoint refuses the request.
          RemoteError: tries or time are used up.
          Cancelled: `stop` was set.
        """
        begin = number = 0
        while True:
            number += 1
            admit()
            if stop.is_set():
                raise Cancelled
            begin = begin if number > 1 else self._clock()
            left = self._config.total_timeout - (self._clock() - begin)
            try:
                return attempt(number, max(left, 1e-3))
            except Exception as error:
                failure = diagnose(error)
                if failure is None:
                    raise
            # outside `except`, so that no error carries the endpoint's raw response along
            self._delay(failure, number, begin, stop)

    def _delay(self, failure: Failure, number: int, begin: float, stop: threading.Event) -> None:
        c = self._config
        # some servers repeat the key that they refuse
        what = failure.message.replace(self._key, "<key>") if c.key_env else failure.message
        if failure.verdict in ("refuse", "too long"):
            kind = TooLong if failure.verdict == "too long" else InvalidRequest
            raise kind(f"{c.model} at {c.base_url} refused the request. {what}")
        backoff = min(c.max_delay, c.first_delay * 2 ** (number - 1)) * (0.5 + self._draw() / 2)
        delay = max(backoff, failure.after or 0.0)
        passed = self._clock() - begin
        why = None
        if failure.verdict == "give up":
            why = "trying again would not help"
        elif number >= c.max_attempts:
            why = f"max_attempts is {c.max_attempts}"
        elif passed + delay >= c.total_timeout:
            why = f"the next try would be {delay:.1f} s later, total_timeout is {c.total_timeout} s"
        if why:
            raise RemoteError(
                f"{c.model} at {c.base_url} gave no reply in {number} tries and {passed:.1f} s "
                f"({why}). Last: {what}",
                attempts=number,
                status=failure.status,
            )
        logger.warning("%s: try %d failed (%s); again in %.2f s", c.model, number, what, delay)
        self._pause(stop, delay)
