"""One assistant turn between the event loop and the backend's threads."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from clvr_jax.backends.protocol import Message, Options, Pending, Reply, Session
from clvr_jax.serving.conversations import Conversations, History


class Turn:
    """A turn that ends with its session kept or closed, whatever happens in between.

    It is made on an event loop, begun in a worker thread, and finished in whichever thread the
    backend calls; nothing waits for it in a thread.

    Attributes:
      reply: an asyncio future of the Reply, or of why there is none.
    """

    def __init__(
        self, conversations: Conversations, on_text: Callable[[str], None] | None = None
    ) -> None:
        """Prepare a turn; `on_text` is called on this event loop, before the reply is there."""
        self._loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[Reply] = self._loop.create_future()
        self._conversations = conversations
        self._on_text = on_text
        self._lock = threading.Lock()
        self._pending: Pending | None = None
        self._abandoned = False

    def begin(self, messages: Sequence[Message], history: History, options: Options) -> None:
        """Submit what is new in `messages`; blocks while the backend prepares pictures.

        Args:
          messages: the whole conversation.
          history: its hashes.
          options: how to generate.

        Raises:
          InvalidRequest, Overloaded: the backend does not take it; the session is closed.
        """
        if self._abandoned:
            return
        session, known = self._conversations.take(history)
        on_text = None if self._on_text is None else self._hear
        try:
            pending = session.submit(messages[known:], options, on_text)
        except BaseException:
            self._conversations.discard(session)
            raise
        with self._lock:
            self._pending = pending
            abandoned = self._abandoned
        if abandoned:  # while it was being submitted
            pending.cancel()
        pending.add_done_callback(lambda done: self._finish(done, session, history))

    def abandon(self) -> None:
        """Cancel what still runs: nobody waits for it. A turn that is over stays as it is."""
        if self.reply.done() and not self.reply.cancelled():
            return
        self.reply.cancel()
        with self._lock:
            self._abandoned = True
            pending = self._pending
        if pending is not None:
            pending.cancel()

    def _hear(self, piece: str) -> None:
        self._on_loop(self._on_text, piece)

    def _finish(self, done: Pending, session: Session, history: History) -> None:
        try:
            reply = done.result()
        except BaseException as error:
            self._conversations.discard(session)
            self._on_loop(self._settle, None, error)
            return
        if self._abandoned or reply.finish == "cancelled":
            self._conversations.discard(session)
        else:  # before the client hears of it, so that its next request finds the session
            self._conversations.put(history.key_after(reply.text), session)
        self._on_loop(self._settle, reply, None)

    def _settle(self, reply: Reply | None, error: BaseException | None) -> None:
        if self.reply.done():
            return
        if error is None:
            self.reply.set_result(reply)
        else:
            self.reply.set_exception(error)
            self.reply.exception()  # of several turns, only the first error is read

    def _on_loop(self, call: Callable[..., Any] | None, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and every listener with it
            self._loop.call_soon_threadsafe(call, *args)
