"""Every exchange in a JSON Lines file, with its pictures beside it.

A line holds `key`, `time` (UTC, when the exchange ended), `seconds`, `request` (endpoint, messages
with pictures by digest, options) and `reply` (text, finish, usage, times, seed, tokens, attempts;
attempts 0 means that the disk cache answered or that it was cancelled before it was sent). The
pictures of run.jsonl lie in run.images/<digest>.png, each once.
"""

import datetime
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clvr_jax.backends.protocol import Reply
from clvr_jax.backends.remote.cache import write_aside
from clvr_jax.backends.remote.records import reply_record
from clvr_jax.backends.remote.request import Request, key_of

logger = logging.getLogger(__name__)


class Transcript:
    """A file that exchanges are appended to; thread-safe, and safe for several processes."""

    def __init__(self, path: str | Path):
        """Take the file's path; it and its folder are made when first needed."""
        self._path = Path(path)
        self._images = self._path.with_suffix(".images")
        self._lock = threading.Lock()
        self._kept: set[str] = set()

    def append(self, request: Request, reply: Reply) -> None:
        """Add an exchange.

        Raises:
          OSError: it could not be written whole. A record that silently lacks exchanges would be
            worse than a turn that fails.
        """
        line = {
            "key": request.key,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "seconds": reply.times.total,
            "request": request.record,
            "reply": reply_record(reply),
        }
        data = json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        with self._lock:
            self._keep_pictures(request)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b", buffering=0) as file:
                # held until the file is closed; other processes may be at it, and half of their
                # line looks like one that was cut off
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.seek(0, os.SEEK_END) > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a line cut off by a crash stays one damaged line
                        data = b"\n" + data
                if file.write(data) != len(data):
                    raise OSError(f"{self._path}: an exchange was written in part; disk full?")

    def _keep_pictures(self, request: Request) -> None:
        for picture in request.pictures:
            if picture.digest in self._kept:
                continue
            path = self._images / f"{picture.digest}.png"
            if not path.exists():
                self._images.mkdir(parents=True, exist_ok=True)
                write_aside(path, picture.png)
            self._kept.add(picture.digest)


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the exchanges of a transcript; damaged lines are logged and left out.

    Raises:
      FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                line = json.loads(data)
                if key_of(line["request"]) != line["key"]:
                    raise ValueError("its key is not that of its request")
            except (ValueError, TypeError, LookupError) as error:
                logger.warning("%s, line %d is damaged and left out: %s", path, number, error)
                continue
            yield line
