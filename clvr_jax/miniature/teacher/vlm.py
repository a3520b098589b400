"""The scripted teacher as a vision-language model: conversation in, text out."""

import re
import threading
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from clvr_jax.backends.protocol import (
    NO_TURN,
    Closed,
    InvalidRequest,
    Message,
    OnText,
    Options,
    Pending,
    Reply,
    Score,
    Session,
    Usage,
)
from clvr_jax.miniature.readings import Readings
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.teacher.answers import answer
from clvr_jax.miniature.teacher.policy import Policy
from clvr_jax.typing import UInt8

Read = Callable[[UInt8[np.ndarray, "b y x 3"]], Readings]
DEFAULTS = Options()


class Teacher:
    """A rule-based stand-in for a strong vision-language model of the miniature.

    It knows the conversation alone: texts, and pictures through `read`. Equal seeds and
    conversations give equal replies; with a temperature above 0 the options' seed counts as well.
    Schemas and grammars are not looked at, its answers have the requests' forms anyway. A token is
    a word.

    Attributes:
      name: "scripted-teacher".
      context: None, there is no limit.
    """

    name = "scripted-teacher"
    context: int | None = None

    def __init__(self, seed: int, policy: Policy, read: Read):
        """Take what it decides by.

        Args:
          seed: of its choices and wordings.
          policy: how it works and when it gives a picture up.
          read: a detector; called with one picture at a time, so that it is compiled once.
        """
        self.seed, self.policy, self._read = seed, policy, read
        self.closed = False

    def start(self) -> "Conversation":
        """Return a new, empty conversation.

        Raises:
          Closed: this was closed.
        """
        if self.closed:
            raise Closed("the scripted teacher has been closed")
        return Conversation(self)

    def load(self) -> dict[str, int]:
        """Return that nothing runs or waits: turns are answered as they are submitted."""
        return {"running": 0, "waiting": 0}

    def close(self) -> None:
        """Refuse new work."""
        self.closed = True

    def look(self, picture: Image.Image) -> Readings:
        """Return the detector's reading of a picture.

        Raises:
          InvalidRequest: it is no picture of this world.
        """
        if picture.size != (SIDE, SIDE):
            width, height = picture.size
            raise InvalidRequest(f"the picture is {width}x{height}; this world's are {SIDE}x{SIDE}")
        return self._read(np.asarray(picture.convert("RGB"))[None])


class Conversation(Session):
    """A session with the teacher; see the protocol's Session."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher
        self._messages: tuple[Message, ...] = ()
        self._readings: tuple[Readings, ...] = ()
        self._before: tuple[tuple[Message, ...], tuple[Readings, ...]] | None = None
        self._lock, self._closed = threading.Lock(), False

    def submit(
        self,
        messages: Sequence[Message],
        options: Options = DEFAULTS,
        on_text: OnText | None = None,
    ) -> Pending:
        """Append messages and answer them, before this returns; see Session.

        Raises:
          InvalidRequest: there are none, they are no request that the teacher knows, or they are
            about things outside of its world.
          Closed: this or the teacher was closed.
        """
        with self._lock:
            self._check_open()
            if not messages:
                raise InvalidRequest("no messages; the teacher cannot continue a turn")
            said = (*self._messages, *messages)
            looks = [self._teacher.look(image) for m in messages for image in m.images]
            readings = (*self._readings, *looks)
            reply = self._reply(said, readings, options)
            self._before = self._messages, self._readings
            self._messages = (*said, Message("assistant", (reply.text,)))
            self._readings = readings
        if on_text and reply.text:
            on_text(reply.text)
        return _Done(reply)

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[Score]:
        """Refuse: rules have no probabilities.

        Raises:
          InvalidRequest: always.
        """
        raise InvalidRequest("the scripted teacher has no log-probabilities; ask it instead")

    def take_back(self) -> None:
        """Forget the last turn; see Session.

        Raises:
          InvalidRequest: no turn has been asked, or it has been taken back already.
          Closed: this or the teacher was closed.
        """
        with self._lock:
            self._check_open()
            if self._before is None:
                raise InvalidRequest(NO_TURN)
            (self._messages, self._readings), self._before = self._before, None

    def _check_open(self) -> None:
        if self._closed or self._teacher.closed:
            raise Closed("the conversation has been closed")

    def close(self) -> None:
        """Forget the messages."""
        self._closed, self._messages, self._readings = True, (), ()

    def _reply(
        self, said: tuple[Message, ...], readings: tuple[Readings, ...], options: Options
    ) -> Reply:
        teacher = self._teacher
        seed = f"{teacher.seed} {options.seed if options.temperature else None}"
        try:
            text = answer(said, readings, teacher.policy, seed)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        for stop in options.stop:
            text = text.partition(stop)[0]
        words = re.findall(r"\s*\S+", text)
        whole = len(words) <= options.max_tokens
        return Reply(
            text if whole else "".join(words[: options.max_tokens]),
            "stop" if whole else "length",
            Usage(sum(len(m.text.split()) for m in said), 0, min(len(words), options.max_tokens)),
            seed=options.seed,
        )


class _Done:
    """A turn that was answered when it was submitted; see the protocol's Pending."""

    def __init__(self, reply: Reply):
        self._reply = reply

    def result(self, timeout: float | None = None) -> Reply:
        return self._reply

    def cancel(self) -> None:
        pass

    def add_done_callback(self, call: Callable[[Pending], None]) -> None:
        call(self)
