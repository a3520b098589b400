"""Finished conversations wait for their next turn, though every request is told in full.

An HTTP client resends the whole history. A session that has already read the beginning of it is
found by a hash over roles, texts and pixels, and is only told what is new.
"""

import collections
import concurrent.futures
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from clvr_jax.backends.protocol import Message, Session

_LOG = logging.getLogger("clvr_jax.serving")


class History:
    """The hashes of a conversation after each of its messages; holds none of its pictures.

    Attributes:
      keys: one hash for each beginning of it, shortest first.
    """

    def __init__(self, messages: Sequence[Message]):
        self._state = hashlib.blake2b(digest_size=32)
        self.keys = [_tell(self._state, message) for message in messages]

    def key_after(self, reply: str) -> bytes:
        """Return the key of the conversation once the assistant has said `reply`."""
        return _tell(self._state.copy(), Message("assistant", (reply,)))


def _tell(state: Any, message: Message) -> bytes:
    """Hash one more message; lengths come first, so no two conversations read the same."""
    parts = message.parts
    if message.role == "assistant":  # a client may send our reply back in pieces
        parts = (message.text,)
    state.update(f"{message.role} {len(parts)}\n".encode())
    for part in parts:
        if isinstance(part, str):
            data = part.encode("utf-8", "surrogatepass")
            state.update(f"text {len(data)}\n".encode())
        else:
            data = part.tobytes()
            state.update(f"image {part.mode} {part.size}\n".encode())
        state.update(data)
    return state.digest()


class Conversations:
    """Sessions between two turns, at most `keep` of them; safe to use from any thread."""

    def __init__(self, start: Callable[[], Session], keep: int):
        self._start, self._keep = start, keep
        # oldest first
        self._waiting: collections.deque[tuple[bytes, Session]] = collections.deque()
        self._lock = threading.Lock()
        self._closed = False
        # closing may take a while, and callers are an event loop or a backend's own thread
        self._closer = concurrent.futures.ThreadPoolExecutor(1, "close-sessions")

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, history: History) -> tuple[Session, int]:
        """Return a session and how many messages of `history` it knows; it is the caller's now.

        It is the session that knows the longest beginning, or a new one. The last message is
        always new: to submit none would mean to continue the last reply.

        Raises:
          Overloaded: the backend starts no session now.
        """
        lengths = {key: i + 1 for i, key in enumerate(history.keys[:-1])}
        with self._lock:
            known = [(lengths.get(key, 0), i) for i, (key, _) in enumerate(self._waiting)]
            length, at = max(known, default=(0, 0))  # of several, the one used last
            if length:
                session = self._waiting[at][1]
                del self._waiting[at]
                return session, length
        return self._start(), 0

    def put(self, key: bytes, session: Session) -> None:
        """Keep a session that waits for its next turn; the oldest one makes room for it."""
        with self._lock:
            self._waiting.append((key, session))
            keep = 0 if self._closed else self._keep
            surplus = [self._waiting.popleft() for _ in range(len(self._waiting) - keep)]
        for _, old in surplus:
            self.discard(old)

    def discard(self, session: Session) -> None:
        """Close a session soon, in another thread."""
        try:
            self._closer.submit(_close, session)
        except RuntimeError:  # after `close`
            _close(session)

    def close(self) -> None:
        """Close every kept session and wait for it; what is put later is closed at once."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, collections.deque()
        for _, session in waiting:
            self.discard(session)
        self._closer.shutdown(wait=True)


def _close(session: Session) -> None:
    try:
        session.close()
    except Exception:
        _LOG.exception("a session could not be closed")
