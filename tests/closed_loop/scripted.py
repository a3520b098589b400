"""Models that say and draw what a test has written down."""

import threading
import time
from concurrent.futures import Future

from PIL import Image

from clvr_jax.backends.images import Drawn
from clvr_jax.backends.protocol import InvalidRequest, Reply, Usage

GENERATE = 'I begin.\n{"action": "generate", "prompt": "a red circle"}'
STOP = 'All is right.\n{"action": "stop"}'


def edit(base, prompt="add a star"):
    """A turn that edits image `base`."""
    return (
        f'Something is missing.\n{{"action": "edit", "prompt": "{prompt}", "references": [{base}]}}'
    )


class Pending:
    """A turn that is there after some seconds, or was cancelled."""

    def __init__(self, reply, seconds, on_text):
        self._reply, self._event = reply, threading.Event()
        self._timer = threading.Timer(seconds, self._event.set) if seconds else None
        if on_text and isinstance(reply, Reply):
            on_text(reply.text)
        if self._timer is None:
            self._event.set()
        else:
            self._timer.daemon = True
            self._timer.start()

    def result(self, timeout=None):
        if not self._event.wait(timeout):
            raise TimeoutError
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply

    def cancel(self):
        """Three tokens have been written by now."""
        self._timer and self._timer.cancel()
        self._reply = Reply("", "cancelled", Usage(20, 0, 3))
        self._event.set()


class Vlm:
    """Says the lines of a script, one a turn; an exception is raised, a number is seconds first.

    Attributes:
      sessions: what each conversation was told, message by message, with the options.
    """

    name, context = "scripted", None

    def __init__(self, *script, tokens=10):
        self._script, self._tokens, self.sessions = list(script), tokens, []

    def start(self):
        told = []
        self.sessions.append(told)
        return Session(self._script, self._tokens, told)

    def load(self):
        return {"running": 0, "waiting": 0}

    def close(self):
        pass


class Session:
    def __init__(self, script, tokens, told):
        self._script, self._tokens, self._told = script, tokens, told

    def submit(self, messages, options, on_text=None):
        self._told.append((tuple(messages), options))
        seconds = self._script.pop(0) if isinstance(self._script[0], float) else 0.0
        said = self._script.pop(0)
        if isinstance(said, InvalidRequest):
            raise said
        if isinstance(said, str):
            words = min(self._tokens, options.max_tokens)
            finish = "stop" if words == self._tokens else "length"
            said = Reply(said, finish, Usage(20, 0, words))
        return Pending(said, seconds, on_text)

    def take_back(self):
        self._told.append("taken back")

    def close(self):
        pass


class Images:
    """Draws a grey picture a call, each of its own level; an exception in the script is raised."""

    name = "painter"

    def __init__(self, *script, evaluations=4, seconds=0.0, longest=80):
        self.evaluations, self._seconds, self._longest = evaluations, seconds, longest
        self._script, self.orders = list(script), []

    def check(self, order):
        if len(order.text) > self._longest:
            raise InvalidRequest(f"the text takes {len(order.text)} letters")

    def submit(self, order):
        self.orders.append(order)
        future = Future()
        said = self._script.pop(0) if self._script else None
        if isinstance(said, Exception):
            future.set_exception(said)
        else:
            time.sleep(self._seconds)
            picture = Image.new("RGB", (64, 64), (len(self.orders),) * 3)
            future.set_result(Drawn(picture, self.evaluations, self._seconds))
        return future

    def close(self):
        pass
