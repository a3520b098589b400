"""A model that says what a transcript says it said, without a network."""

import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clvr_jax.backends.protocol import OnText, Options, Reply
from clvr_jax.backends.remote import transcript
from clvr_jax.backends.remote.errors import NotRecorded
from clvr_jax.backends.remote.records import free, reply_from
from clvr_jax.backends.remote.request import Request, Said
from clvr_jax.backends.remote.session import Conversation, Workers, cancelled

_AROUND = 30  # characters shown on each side of a difference


class Replay:
    """A Vlm over a transcript; needs no API key and sends nothing.

    A request is found by the same key as in the disk cache. If it was recorded several times (a
    sample without a seed), the replies come in the order of the transcript, and then the last one
    again. Replies that were cancelled are not replayed.

    Attributes:
      name: of the recorded model.
      context: None.
    """

    def __init__(self, path: str | Path, *, model: str | None = None, base_url: str | None = None):
        """Read a transcript.

        Args:
          path: of its JSON Lines file.
          model, base_url: which endpoint to replay, where the transcript holds several.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it holds nothing of that endpoint, or of several.
        """
        self._path = Path(path)
        wanted = {"model": model, "base_url": base_url and base_url.rstrip("/")}
        lines = [
            line
            for line in transcript.read(path)
            if line["reply"]["finish"] != "cancelled"
            and all(v in (None, line["request"]["endpoint"][k]) for k, v in wanted.items())
        ]
        endpoints = [line["request"]["endpoint"] for line in lines]
        different = [e for i, e in enumerate(endpoints) if e not in endpoints[:i]]
        if len(different) != 1:
            found = "; ".join(map(json.dumps, different)) or "none"
            raise ValueError(
                f"{path} must hold replies of exactly one endpoint with {wanted}; found: {found}"
            )
        self._endpoint: dict[str, Any] = different[0]
        self.name: str = self._endpoint["model"]
        self.context: int | None = None
        self._records = [line["request"] for line in lines]
        self._replies: dict[str, list[Reply]] = {}
        for line in lines:
            self._replies.setdefault(line["key"], []).append(reply_from(line["reply"]))
        self._lock = threading.Lock()
        self._workers = Workers(4, self.name, lambda: None)

    def start(self) -> Conversation:
        """Return a new, empty conversation."""
        self._workers.check_open()
        kind, _, quality = self._endpoint["images"].partition(" ")
        jpeg_quality = int(quality) if kind == "jpeg" else None
        return Conversation(self._workers, self._request, self._answer, jpeg_quality)

    def load(self) -> dict[str, int]:
        """Return how many turns are being answered and how many wait."""
        return self._workers.load()

    def close(self) -> None:
        """Refuse new work; may be called twice."""
        self._workers.close()

    def _request(self, messages: tuple[Said, ...], options: Options) -> Request:
        return Request(self._endpoint, messages, options)

    def _answer(
        self, request: Request, on_text: OnText | None, stop: threading.Event, submitted: float
    ) -> Reply:
        with self._lock:
            replies = self._replies.get(request.key)
            if not replies:
                raise NotRecorded(
                    f"{self._path} does not hold this request. Nearest recorded one: "
                    f"{nearest(request.record, self._records)}"
                )
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        reply = free(reply, time.monotonic() - submitted)
        if stop.is_set():
            return cancelled("", reply.times)
        if on_text and reply.text:
            on_text(reply.text)
        return reply


def nearest(asked: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]]) -> str:
    """Return in words how a request differs first from the most similar recorded one."""
    best = max(recorded, key=lambda record: _likeness(asked, record))
    return f"{len(best['messages'])} messages, {_difference(asked, best)}"


def _likeness(asked: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[int, int, int]:
    ours, theirs = _flat(asked["messages"]), _flat(record["messages"])
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))
    options = sum(asked["options"][k] == v for k, v in record["options"].items())
    return sum(1 for _ in same), -abs(len(ours) - len(theirs)), options


def _flat(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    return [(message["role"], part) for message in messages for part in message["parts"]]


def _difference(asked: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    for i, (ours, theirs) in enumerate(zip(asked["messages"], record["messages"])):
        where = f"message {i} ({ours['role']})"
        if ours["role"] != theirs["role"]:
            return f"message {i} is asked as {ours['role']}, recorded as {theirs['role']}"
        for j, (our, their) in enumerate(zip(ours["parts"], theirs["parts"])):
            if our != their:
                return f"{where}, part {j} differs: {_parts(our, their)}"
        if len(ours["parts"]) != len(theirs["parts"]):
            counts = f"{len(ours['parts'])} parts, recorded {len(theirs['parts'])}"
            return f"{where} has {counts}"
    if len(asked["messages"]) != len(record["messages"]):
        return f"equal as far as both go, but {len(asked['messages'])} messages are asked"
    options = [
        f"{name} is {value!r}, recorded {record['options'].get(name)!r}"
        for name, value in asked["options"].items()
        # as text, since the order of a schema's properties counts
        if json.dumps(value) != json.dumps(record["options"].get(name))
    ]
    return f"options differ: {'; '.join(options)}"


def _parts(our: Mapping[str, Any], their: Mapping[str, Any]) -> str:
    if "text" not in our or "text" not in their:
        return f"asked {_short(our)}, recorded {_short(their)}"
    a, b = our["text"], their["text"]
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    window = slice(max(0, at - _AROUND), at + _AROUND)
    return f"from character {at}, asked {a[window]!r}, recorded {b[window]!r}"


def _short(part: Mapping[str, Any]) -> str:
    if "text" in part:
        return f"text {part['text'][: 2 * _AROUND]!r}"
    width, height = part["size"]
    return f"image {part['image'][:12]} of {width} x {height}"
