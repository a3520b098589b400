"""POST /v1/chat/completions.

Everything that can end a request early, a client that leaves, a time limit, an error in one of
several choices, is a cancellation here, and every path out abandons the turns that still run.
"""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from clvr_jax.backends.protocol import Reply, Vlm
from clvr_jax.serving import transport, wire
from clvr_jax.serving.answers import Answer
from clvr_jax.serving.conversations import Conversations, History
from clvr_jax.serving.errors import ApiError, error_of, invalid
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.translate import messages_of, options_of
from clvr_jax.serving.turns import Turn


class Chat:
    """The endpoint, an ASGI application.

    Attributes:
      accepted: requests from their header to the end of their answer; one for n choices counts
        n times.
      running: those of them that the backend has.
      conversations: the sessions between two turns.
    """

    def __init__(self, vlm: Vlm, limits: Limits) -> None:
        self.vlm, self.limits = vlm, limits
        self.conversations = Conversations(vlm.start, limits.kept_conversations)
        self.accepted = 0
        self.running = 0
        # unlike anyio's limiter, a pool still counts a thread that its client has left behind
        self._workers = concurrent.futures.ThreadPoolExecutor(limits.workers, "serving")

    def close(self) -> None:
        """Wait for what is being submitted, then close every kept session."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self.conversations.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
          Exception: why it cannot be answered, while nothing of an answer is sent.
        """
        # accepted before the body is read: bodies are what fills memory
        with self._accept(1):
            try:
                body = await transport.read_json_body(scope, receive, self.limits)
            except ClientDisconnect:
                return
            answer = asyncio.create_task(self._answer(body, scope, receive, send))
            del body
            gone = asyncio.create_task(transport.disconnected(receive))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:  # the time that a shutdown leaves us is over
                raise ApiError(503, "the server is stopping", code="stopping") from None
            finally:
                gone.cancel()
                answer.cancel()
            await asyncio.wait({answer})
        if not answer.cancelled():
            answer.result()

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        events = transport.EventStream(send)
        try:
            async with asyncio.timeout(self.limits.timeout_s) as clock:
                asked = await self._in_worker(wire.parse, body)
                del body
                self._check(asked)
                if asked.stream:
                    await self._stream(asked, events)
                    return
                with self._accept((asked.n or 1) - 1):
                    replies = await self._replies(asked)
        except Exception as error:
            if isinstance(error, TimeoutError) and clock.expired():
                error = TimeoutError(f"no complete reply within {self.limits.timeout_s:g} s")
            if not events.started:
                raise error from None
            await events.fail(error_of(error))
            return
        await JSONResponse(Answer(self.vlm.name).whole(replies))(scope, receive, send)

    async def _replies(self, asked: wire.ChatRequest) -> list[Reply]:
        turns = [Turn(self.conversations) for _ in range(asked.n or 1)]
        async with self._begun(asked, turns):
            return [_complete(await turn.reply) for turn in turns]

    async def _stream(self, asked: wire.ChatRequest, events: transport.EventStream) -> None:
        inbox: asyncio.Queue[str | None] = asyncio.Queue()  # pieces, then None
        turn = Turn(self.conversations, inbox.put_nowait)
        turn.reply.add_done_callback(lambda _: inbox.put_nowait(None))
        answer = Answer(self.vlm.name)
        options = asked.stream_options
        with_usage = options is not None and bool(options.include_usage)
        no_usage = {"usage": None} if with_usage else {}
        sent = ""
        async with self._begun(asked, [turn]):
            # nothing is sent before the first piece, so that refusals keep their status
            piece = await inbox.get()
            if piece is None:
                _complete(turn.reply.result())
            await events.data(answer.chunk({"role": "assistant", "content": ""}) | no_usage)
            while piece is not None:
                sent += piece
                await events.data(answer.chunk({"content": piece}) | no_usage)
                piece = await inbox.get()
            reply = _complete(turn.reply.result())
        rest = reply.text.removeprefix(sent)
        if rest and reply.text.startswith(sent):  # pieces that the backend held back
            await events.data(answer.chunk({"content": rest}) | no_usage)
        await events.data(answer.last(reply) | no_usage)
        if with_usage:
            await events.data(answer.usage(reply))
        await events.done()

    @contextlib.asynccontextmanager
    async def _begun(self, asked: wire.ChatRequest, turns: Sequence[Turn]):
        """Hand the turns to the backend; on the way out abandon those that are not over."""
        try:
            await self._in_worker(self._begin, asked, turns)
            self.running += len(turns)
            try:
                yield
            finally:
                self.running -= len(turns)
        finally:
            for turn in turns:
                turn.abandon()

    def _begin(self, asked: wire.ChatRequest, turns: Sequence[Turn]) -> None:
        options = [options_of(asked, self.limits, i) for i in range(len(turns))]
        messages = messages_of(asked.messages, self.limits)
        asked.messages.clear()  # or pictures in base64 stay for as long as the reply takes
        history = History(messages)
        for turn, how in zip(turns, options, strict=True):
            turn.begin(messages, history, how)

    async def _in_worker(self, call: Callable[..., Any], *args: Any) -> Any:
        # a client that leaves does not wait for the thread: what it leaves behind, `Turn` tidies
        return await asyncio.get_running_loop().run_in_executor(self._workers, call, *args)

    def _check(self, asked: wire.ChatRequest) -> None:
        if asked.model != self.vlm.name:
            raise no_such_model(asked.model, self.vlm.name)
        if (asked.n or 1) > self.limits.max_choices:
            text = f"n is {asked.n}; it must be at most {self.limits.max_choices}"
            raise invalid(text, "n", "invalid_value")

    @contextlib.contextmanager
    def _accept(self, count: int) -> Iterator[None]:
        if self.accepted + count > self.limits.max_queue:
            text = f"{self.accepted} requests are being answered already; try again soon"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"})
        self.accepted += count
        try:
            yield
        finally:
            self.accepted -= count


def no_such_model(asked: str, served: str) -> ApiError:
    """Return the error of a request for a model that is not here."""
    text = f"the model {asked!r} is not here; this server has {served!r}"
    return ApiError(404, text, param="model", code="model_not_found")


def _complete(reply: Reply) -> Reply:
    if reply.finish == "cancelled":  # not by us: the backend is closing
        raise ApiError(503, "the model stopped in the middle of its reply", code="cancelled")
    return reply
