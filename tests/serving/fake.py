"""A model that does what its last message says, and counts what the server does to it.

A message is echoed word by word unless it begins with one of the commands in `_Pending._speak` and
`FakeSession.submit`.
"""

import threading
import time

from clvr_jax.backends.protocol import (
    InvalidRequest,
    Options,
    Overloaded,
    Reply,
    Times,
    TokenLogprob,
    TooLong,
    Usage,
)


def words(messages) -> int:
    return sum(len(message.text.split()) for message in messages)


class FakePending:
    def __init__(self, session, text, options, usage, on_text):
        self.session, self.text, self.options = session, text, options
        self.usage, self.on_text = usage, on_text
        self.cancelled = threading.Event()
        self.reply = self.error = None
        self.calls, self.over, self.lock = [], threading.Event(), threading.Lock()

    def speak(self):
        command, _, rest = self.text.partition(" ")
        try:
            if command == "fail":
                raise RuntimeError("the model broke")
            if command == "late-refusal":
                raise InvalidRequest("the schema is broken")
            if command == "stop-yourself":
                self.cancelled.set()
            if command in ("hang", "prepare-hang"):
                self.cancelled.wait(30)
            if command == "then-fail":
                self.on_text("so far")
                raise RuntimeError("the model broke")
            self.reply = self._say(float(rest) if command == "slow" else 0.0)
        except Exception as error:
            self.error = error
        self.session.busy = False
        with self.lock:
            self.over.set()
            calls = list(self.calls)
        for call in calls:
            call(self)

    def _say(self, delay):
        wanted = ["one ", "two ", "three ", "four "] if delay else pieces_of(self.text)
        said = []
        for piece in wanted[: self.options.max_tokens]:
            if self.cancelled.wait(delay) if delay else self.cancelled.is_set():
                break
            said.append(piece)
            if self.on_text:
                self.on_text(piece)
        finish = "length" if len(said) < len(wanted) else "stop"
        finish = "cancelled" if self.cancelled.is_set() else finish
        text = "".join(said)
        self.session.known += words([]) + len(text.split())
        rivals = ((" x", b" x", -2.5), ("�", b"\xf0\x9f", float("-inf")))
        rivals = rivals[: self.options.logprobs or 0]
        tokens = tuple(TokenLogprob(p, p.encode(), -0.25, rivals) for p in said)
        return Reply(
            text=text,
            finish=finish,
            usage=Usage(*self.usage, completion=len(said)),
            times=Times(0.1, 0.2, 0.3, 0.4, 0.05, 0.9),
            seed=7 if self.options.seed is None else self.options.seed,
            tokens=tokens if self.options.logprobs is not None else (),
        )

    def result(self, timeout=None):
        if not self.over.wait(timeout):
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self.reply

    def cancel(self):
        self.session.vlm.cancels += 0 if self.over.is_set() else 1
        self.cancelled.set()

    def add_done_callback(self, call):
        with self.lock:
            if not self.over.is_set():
                self.calls.append(call)
                return
        call(self)


class FakeSession:
    def __init__(self, vlm):
        self.vlm, self.busy, self.known = vlm, False, 0
        vlm.open.add(self)

    def submit(self, messages, options=Options(), on_text=None):
        if self.busy or self not in self.vlm.open:
            self.vlm.violations.append("submitted to a busy or closed session")
        self.vlm.told.append((self, tuple(messages), options))
        self.vlm.threads.add(threading.current_thread().name)
        text = messages[-1].text
        command, _, rest = text.partition(" ")
        if command == "break":
            raise RuntimeError("submit broke")
        if command == "too-long":
            raise TooLong("the conversation has 5000 tokens; the context holds 4096")
        if command == "overloaded":
            raise Overloaded("16 turns are running already")
        if command in ("prepare", "prepare-hang"):
            time.sleep(float(rest))
        self.busy = True
        self.vlm.peak = max(self.vlm.peak, sum(s.busy for s in set(self.vlm.open)))
        cached, self.known = self.known, self.known + words(messages)
        pending = FakePending(self, text, options, (self.known, cached), on_text)
        threading.Thread(target=pending.speak, daemon=True).start()
        return pending

    def ask(self, messages, options=Options(), on_text=None):
        return self.submit(messages, options, on_text).result()

    def score(self, messages, continuations):
        raise InvalidRequest("the fake does not score")

    def take_back(self):
        self.vlm.violations.append("took a turn back, which no client of a server asks for")

    def close(self):
        if self.busy:
            self.vlm.violations.append("closed a busy session")
        if self not in self.vlm.open:
            self.vlm.violations.append("closed a session twice")
        self.vlm.open.discard(self)


class FakeVlm:
    """Counts open sessions, what they were told, cancels, most turns at once, broken rules."""

    name = "lab/fake-vlm"
    context = 4096

    def __init__(self):
        self.open, self.told, self.violations, self.threads = set(), [], [], set()
        self.cancels = self.peak = 0

    def start(self):
        return FakeSession(self)

    def load(self):
        return {"running": len(self.open), "waiting": 0}

    def close(self):
        pass


def pieces_of(text):
    first, *rest = ("you said: " + text).split(" ")
    return [first, *(" " + word for word in rest)]
