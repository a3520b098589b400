"""Bodies in, errors and event streams out: what is below JSON and above ASGI."""

import asyncio
import contextlib
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.limits import Limits

_BODY_READ = "clvr_jax.body_read"
_DRAIN_S = 1.0


async def read_json_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return the body of a request that says it is JSON.

    Raises:
      ApiError: it is no JSON by its header, too large, or too slow.
      ClientDisconnect: the client left before its end.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "")
    # browsers send text/plain to other sites without asking, application/json they do not
    if kind.split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"content-type is {kind!r}; it must be application/json")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "content-encoding is set; send the body uncompressed")
    too_large = ApiError(
        413,
        f"the body is larger than {limits.max_body_bytes} bytes; send smaller or fewer pictures",
        code="body_too_large",
    )
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)  # a chunked body declares nothing
                if size > limits.max_body_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_timeout_s:g} s"
        raise ApiError(408, text, code="timeout") from None
    scope[_BODY_READ] = True
    return b"".join(chunks)


class ErrorResponse(JSONResponse):
    """An error, which also reaches a client that is still sending its body.

    Closing a connection with unread data resets it, and the client may lose what it was told.
    So the answer goes out first, then the rest of the body is read and forgotten for a moment.
    """

    def __init__(self, error: ApiError):
        super().__init__(error.body, error.status, error.headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        if scope["method"] in ("GET", "HEAD") or scope.get(_BODY_READ):
            return await super().__call__(scope, receive, send)
        self.headers["connection"] = "close"
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone; to be called once the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events as OpenAI's clients read them.

    Attributes:
      started: the status is sent, so errors can only be events.
    """

    def __init__(self, send: Send):
        self.send = send
        self.started = False

    async def data(self, content: dict[str, Any]) -> None:
        """Send one event; the first sends status and headers as well."""
        await self._write(json.dumps(content, allow_nan=False, separators=(",", ":")))

    async def fail(self, error: ApiError) -> None:
        """Send an error as the last event, unless the client does not even read that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.data(error.body)
                await self.done()

    async def done(self) -> None:
        """End the stream."""
        await self._write("[DONE]", more=False)

    async def _write(self, text: str, more: bool = True) -> None:
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # nginx would hold the pieces back
            ]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        body = f"data: {text}\n\n".encode()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})
