"""Replies as JSON, for the cache and transcripts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pydantic

from clvr_jax.backends.protocol import Reply, Times

_REPLY = pydantic.TypeAdapter(Reply)


def reply_record(reply: Reply) -> dict[str, Any]:
    """Return a reply for JSON; bytes of tokens become texts of Latin-1, a character a byte."""
    record = dataclasses.asdict(reply)
    for token in record["tokens"]:
        token["raw"] = token["raw"].decode("latin-1")
        token["rivals"] = [[text, raw.decode("latin-1"), p] for text, raw, p in token["rivals"]]
    return record


def reply_from(record: Mapping[str, Any]) -> Reply:
    """Return the reply of a record.

    Raises:
      ValueError: it is not one of `reply_record`.
    """
    try:
        tokens = [
            token
            | {
                "raw": token["raw"].encode("latin-1"),
                "rivals": [(text, raw.encode("latin-1"), p) for text, raw, p in token["rivals"]],
            }
            for token in record["tokens"]
        ]
        return _REPLY.validate_python({**record, "tokens": tokens})
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"not the record of a reply: {error}") from error


def free(reply: Reply, seconds: float) -> Reply:
    """Return a reply as it is given from storage: as it was, but at no cost, tries and time."""
    times = Times(total=seconds, first=seconds)
    usage = dataclasses.replace(reply.usage, cost=0.0)
    return dataclasses.replace(reply, usage=usage, times=times, attempts=0)
