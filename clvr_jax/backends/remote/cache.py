"""Replies on disk, so that the same request is paid for once."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clvr_jax.backends.protocol import Reply
from clvr_jax.backends.remote.records import reply_from, reply_record
from clvr_jax.backends.remote.request import Request

logger = logging.getLogger(__name__)


class DiskCache:
    """A folder of replies, one file each, by the key of their request.

    Safe for many threads and processes at once: a file appears whole or not at all, and two that
    store the same key store the same.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)

    def load(self, request: Request) -> Reply | None:
        """Return the stored reply; None if there is none, or (logged) a damaged one."""
        path = self._path(request.key)
        try:
            entry = json.loads(path.read_bytes())
            if entry["check"] != _check(entry["reply"]):
                raise ValueError("its checksum does not match")
            return reply_from(entry["reply"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning("cache entry %s is damaged and not used: %s", path, error)
            return None

    def store(self, request: Request, reply: Reply) -> None:
        """Keep a reply. A full or read-only disk is logged: the reply is paid for and good."""
        record = reply_record(reply)
        entry = {"request": request.record, "reply": record, "check": _check(record)}
        path = self._path(request.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, json.dumps(entry).encode("ascii"))
        except OSError as error:
            logger.warning("cache entry %s could not be written: %s", path, error)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one, or none, until the new one is whole."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def _check(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode("ascii")).hexdigest()
