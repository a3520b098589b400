"""Where the records of JSON and JSONL files lie, so that each is read alone."""

import json
import mmap
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class RecordError(ValueError):
    """A record or file that cannot be used.

    Attributes:
      faults: all that was found wrong with it, in words; the message joins them.
    """

    def __init__(self, *faults: str):
        super().__init__("; ".join(faults))
        self.faults = faults


class Places(NamedTuple):
    """Records of a file.

    Attributes:
      starts: (records,) first byte of each.
      ends: (records,) the byte after each.
      lines: (records,) the line on which each starts, counted from 1.
    """

    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray


def jsonl_places(path: Path) -> Places:
    """Return where the lines of a file lie; blank ones are left out."""
    found, position = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            skip = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if line[skip:].strip():
                found.append((position + skip, position + len(line), number))
            position += len(line)
    return _places(found)


def json_places(path: Path) -> Places:
    """Return where the records of a JSON file lie: an array's elements, or the one object it is.

    Files that hold one object a line, in spite of their name, are read as JSONL.

    Raises:
      RecordError: it is neither; the message begins with the line.
    """
    with path.open("rb") as file:
        if not file.read(1):
            raise RecordError("1: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = len(_BOM) if text[: len(_BOM)] == _BOM else 0
            while text[start : start + 1].isspace():
                start += 1
            opening = text[start : start + 1]
            if opening == b"[":
                return _places(_elements(text, start))
            if opening != b"{":
                line = text[:start].count(b"\n") + 1
                raise RecordError(f"{line}: neither an array of records nor a record")
            first = text[start : text.find(b"\n", start) + 1 or len(text)]
            if not _is_json(first):
                return _places([(start, len(text), text[:start].count(b"\n") + 1)])
    return jsonl_places(path)


def decode(data: bytes) -> dict[str, Any]:
    """Return a record from its bytes.

    Raises:
      RecordError: they are no UTF-8, no JSON, no object, or name a field twice.
    """
    try:
        record = json.loads(
            data.rstrip().decode("utf-8"), object_pairs_hook=_object, parse_constant=_no
        )
    except UnicodeDecodeError as error:
        raise RecordError(
            f"is no UTF-8: byte 0x{data[error.start]:02x} at byte {error.start} of the record"
        ) from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the record, " if error.lineno > 1 else ""
        raise RecordError(f"is no JSON: {error.msg} ({line}column {error.colno})") from error
    except RecursionError as error:
        raise RecordError("is no record: too many levels of brackets") from error
    if not isinstance(record, dict):
        raise RecordError(f"is a {type(record).__name__}; a record is a JSON object")
    return record


def _elements(text: mmap.mmap, start: int) -> list[tuple[int, int, int]]:
    """Return (start, end, line) of the objects of an array that begins at `start`."""
    found: list[tuple[int, int, int]] = []
    depth, line, counted, end = 0, 1, 0, start + 1

    def line_at(position: int) -> int:
        nonlocal line, counted
        line += text[counted:position].count(b"\n")
        counted = position
        return line

    for token in _TOKEN.finditer(text, start):
        kind = token[0]
        if kind in b"[{":
            depth += 1
            if depth == 2:
                between = text[end : token.start()].strip()
                if kind == b"[" or between != (b"," if found else b""):
                    raise RecordError(f"{line_at(end)}: expected records separated by commas")
                begin = token.start()
        elif kind in b"]}":
            depth -= 1
            if depth == 1:
                found.append((begin, token.end(), line_at(begin)))
                end = token.end()
            if depth == 0:
                if kind != b"]" or text[end : token.start()].strip():
                    raise RecordError(f"{line_at(end)}: expected a record or the array's end")
                if text[token.end() :].strip():
                    raise RecordError(f"{line_at(token.end())}: text follows the array's end")
                return found
    raise RecordError(f"{line_at(begin if depth > 1 else end)}: the array is cut off; no ] ends it")


def _places(found: list[tuple[int, int, int]]) -> Places:
    table = np.array(found, np.int64).reshape(-1, 3)
    return Places(table[:, 0], table[:, 1], table[:, 2])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"is no record: the field {twice!r} stands twice in one object")
    return fields


def _no(constant: str) -> None:
    raise RecordError(f"is no JSON: {constant} is no JSON number")
