"""Conversations and their turns, for any way of answering them."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from clvr_jax.backends.protocol import (
    NO_TURN,
    Closed,
    InvalidRequest,
    Message,
    OnText,
    Options,
    Overloaded,
    Pending,
    Reply,
    Score,
    Session,
    Times,
    Usage,
)
from clvr_jax.backends.remote.request import Request, Said, prepare

# answers a request: where text goes, what cancels it, and when it was submitted (monotonic)
Answerer = Callable[[Request, OnText | None, threading.Event, float], Reply]
DEFAULTS = Options()
MakeRequest = Callable[[tuple[Said, ...], Options], Request]


class Turn:
    """A turn that is being generated; see the protocol's Pending."""

    def __init__(
        self, work: Callable[[threading.Event], Reply], settle: Callable[[Reply | None], None]
    ):
        """Take what to do.

        Args:
          work: generates the reply, until the event is set.
          settle: called with the reply, or None for an error, before anybody else sees it.
        """
        self._work = work
        self._settle = settle
        self._stop = threading.Event()
        self._future: Future[Reply] = Future()
        self._lock = threading.Lock()
        self._begun = False
        self._since = time.monotonic()

    def run(self) -> None:
        """Generate, in the calling thread, unless cancelled before."""
        if not self._begin():
            return
        try:
            reply = self._work(self._stop)
        except BaseException as error:  # whoever waits for the result is told, whatever it is
            self._settle(None)
            self._future.set_exception(error)
        else:
            self._settle(reply)
            self._future.set_result(reply)

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply; see Pending."""
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Stop soon; at once if it has not begun."""
        self._stop.set()
        if self._begin():
            seconds = time.monotonic() - self._since
            reply = cancelled("", Times(queued=seconds, total=seconds))
            self._settle(reply)
            self._future.set_result(reply)

    def add_done_callback(self, call: Callable[[Pending], None]) -> None:
        """Call `call` with this once the reply or its error is there."""
        self._future.add_done_callback(lambda _: call(self))

    def _begin(self) -> bool:
        with self._lock:
            first, self._begun = not self._begun, True
            return first


def cancelled(text: str, times: Times, attempts: int = 0) -> Reply:
    """Return the reply of a turn that was cancelled while nothing was being generated."""
    return Reply(text, "cancelled", Usage(0, 0, 0), times, attempts=attempts)


class Workers:
    """Threads that work on turns, in order of submission; thread-safe."""

    def __init__(self, threads: int, name: str, on_closed: Callable[[], None]):
        """Take the number of threads.

        Args:
          threads: most turns that are worked on at the same time.
          name: of the model, for errors.
          on_closed: called once, when this was closed and the last turn has ended.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="remote-vlm")
        self._name, self._threads = name, threads
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._turns: set[Turn] = set()
        self._closed = False

    def start(self, turn: Turn) -> None:
        """Work on `turn` as soon as a thread is free.

        Raises:
          Closed: this was closed.
        """
        with self._lock:
            self.check_open()
            self._turns.add(turn)
            self._pool.submit(turn.run)
        turn.add_done_callback(self._done)

    def check_open(self) -> None:
        """Raise Closed if this was closed."""
        if self._closed:
            raise Closed(f"{self._name} has been closed")

    def load(self) -> dict[str, int]:
        """Return how many turns are worked on and how many wait for a thread."""
        with self._lock:
            turns = len(self._turns)
        running = min(turns, self._threads)
        return {"running": running, "waiting": turns - running}

    def close(self) -> None:
        """Refuse new turns and cancel all; does not wait for those that are being answered."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            turns = list(self._turns)
        for turn in turns:
            turn.cancel()
        self._pool.shutdown(wait=False)
        if not turns:
            self._on_closed()

    def _done(self, turn: Pending) -> None:
        with self._lock:
            self._turns.discard(turn)
            last = self._closed and not self._turns
        if last:
            self._on_closed()


class Conversation(Session):
    """A session that owns its message list; see the protocol's Session.

    A turn that fails leaves the messages as they were, and so does one that is cancelled before
    any text came. A turn cancelled later leaves what was said until then.
    """

    def __init__(
        self,
        workers: Workers,
        request: MakeRequest,
        answer: Answerer,
        jpeg_quality: int | None = None,
    ):
        """Begin an empty conversation.

        Args:
          workers: where turns are worked on.
          request: makes the request of a whole conversation, or refuses it.
          answer: answers one.
          jpeg_quality: see RemoteConfig.
        """
        self._workers = workers
        self._request = request
        self._answer = answer
        self._jpeg_quality = jpeg_quality
        self._messages: tuple[Said, ...] = ()
        self._before: tuple[Said, ...] | None = None  # the last turn
        self._turn: Turn | None = None
        self._closed = False
        self._lock = threading.Lock()

    def submit(
        self,
        messages: Sequence[Message],
        options: Options = DEFAULTS,
        on_text: OnText | None = None,
    ) -> Turn:
        """Append messages and begin to generate the assistant's turn; see Session.

        Raises:
          InvalidRequest: it can never be answered; `messages` is empty.
          Overloaded: the last turn is not done yet, or this or the model was closed.
        """
        if not messages:
            raise InvalidRequest(
                "no messages; a remote endpoint cannot continue a turn, only local models can"
            )
        new = tuple(prepare(message, self._jpeg_quality) for message in messages)
        submitted = time.monotonic()
        with self._lock:
            self._check_idle()
            self._workers.check_open()
            request = self._request((*self._messages, *new), options)

            def work(stop: threading.Event) -> Reply:
                return self._answer(request, on_text, stop, submitted)

            def settle(reply: Reply | None) -> None:
                with self._lock:
                    self._turn = None
                    said = reply is not None and (reply.text or reply.finish != "cancelled")
                    if said and not self._closed:
                        self._messages = (*request.messages, Said("assistant", (reply.text,)))

            turn = self._turn = Turn(work, settle)
            self._before = self._messages
        try:
            self._workers.start(turn)
        except Overloaded:
            with self._lock:
                self._turn = None
            raise
        return turn

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[Score]:
        """Refuse: chat completions tell the log-probabilities of generated tokens only.

        Raises:
          InvalidRequest: always.
        """
        raise InvalidRequest(
            "a chat completions endpoint does not give log-probabilities of given text; score "
            "with a local model, or ask with Options(logprobs=n) and compare the choices' tokens"
        )

    def take_back(self) -> None:
        """Forget the last turn; see Session.

        Raises:
          InvalidRequest: no turn has been asked, or it has been taken back already.
          Overloaded: the last turn is not done yet, or this was closed.
        """
        with self._lock:
            self._check_idle()
            if self._before is None:
                raise InvalidRequest(NO_TURN)
            self._messages, self._before = self._before, None

    def _check_idle(self) -> None:
        if self._closed:
            raise Closed("the session has been closed")
        if self._turn is not None:
            raise Overloaded(
                "the session's last turn is still being generated; wait for its result, or "
                "start another session to ask at the same time"
            )

    def close(self) -> None:
        """Cancel a turn that is being generated and forget the messages."""
        with self._lock:
            self._closed, self._messages, turn = True, (), self._turn
        if turn is not None:
            turn.cancel()
