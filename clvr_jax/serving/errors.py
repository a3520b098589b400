"""Errors in OpenAI's form, and which of them an exception is."""

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from clvr_jax.backends.protocol import Closed, InvalidRequest, Overloaded, TooLong

LOG = logging.getLogger("clvr_jax.serving")


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
      status: the HTTP status.
      param: path of the field that is wrong, e.g. messages[0].content[1].image_url.url.
      code: a short name of the error, for programs.
      headers: what the answer's header says in addition.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that can never be answered."""
    return ApiError(400, message, param=param, code=code)


def error_of(error: BaseException) -> ApiError:
    """Return what the client is told of `error`; what nobody foresaw is logged with its trace."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        text = error.detail if isinstance(error.detail, str) else repr(error.detail)
        return ApiError(error.status_code, text, headers=error.headers)
    if isinstance(error, TooLong):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return invalid(str(error))
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", headers={"retry-after": "1"})
    if isinstance(error, TimeoutError):
        # openai's client would otherwise repeat what just took too long, twice
        headers = {"x-should-retry": "false"}
        return ApiError(504, f"timeout: {error}", code="timeout", headers=headers)
    number = secrets.token_hex(8)
    LOG.error("error %s: a request failed unexpectedly", number, exc_info=error)
    text = f"internal error; the server's log has its trace under {number}"
    return ApiError(500, text, code="internal_error", headers={"x-request-id": number})
