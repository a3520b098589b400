"""The application: its routes, its key and its last line of defence."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clvr_jax import __version__
from clvr_jax.backends.protocol import Vlm
from clvr_jax.serving.chat import Chat, no_such_model
from clvr_jax.serving.errors import ApiError, error_of
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.transport import ErrorResponse


def make_app(vlm: Vlm, limits: Limits, api_key: str | None) -> Starlette:
    """Return the application that serves `vlm` as OpenAI's chat completions.

    Kept sessions are closed when the application's lifespan ends; `vlm` stays open.

    Args:
      vlm: what answers; its name is the model's name.
      limits: what is refused.
      api_key: asked of every request but GET /health, as `Authorization: Bearer KEY`; None asks
        for none.

    Raises:
      ValueError: the key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty; give a key, or None to serve without one")
    chat = Chat(vlm, limits)
    started = time.time()
    model = {"id": vlm.name, "object": "model", "created": int(started), "owned_by": "clvr_jax"}
    model["max_model_len"] = vlm.context

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != vlm.name:
            raise no_such_model(request.path_params["name"], vlm.name)
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "model": vlm.name,
                "running": chat.running,  # the backend has them
                "waiting": chat.accepted - chat.running,  # being received and prepared
                "backend": vlm.load(),
                "kept_conversations": len(chat.conversations),
                "uptime_s": round(time.time() - started, 3),
                "version": __version__,
            }
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(chat.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),  # names like Qwen/Qwen3-VL-4B
            Route("/health", health),
        ],
        middleware=[Middleware(_Gate, api_key=api_key)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    failure = error_of(error)
    if failure.status == 404:
        failure = ApiError(404, f"there is nothing at {request.url.path}", code="not_found")
    if failure.status == 405:
        text = f"{request.method} is not for {request.url.path}; use {failure.headers['Allow']}"
        failure = ApiError(405, text, code="method_not_allowed", headers=failure.headers)
    return ErrorResponse(failure)


class _Gate:
    """Asks for the key, and makes an answer of every exception that has none yet."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, receive, watch)
        except Exception as error:
            if started:  # too late for an answer: the server logs it and closes the connection
                raise
            await ErrorResponse(error_of(error))(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self.key is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # in constant time: how long a comparison takes must not say how much of a key is right
        right = hmac.compare_digest(key.strip(), self.key)
        if scheme.lower() == b"bearer" and right:
            return
        text = "the API key is wrong" if given else "the API key is missing"
        raise ApiError(
            401,
            f"{text}; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
