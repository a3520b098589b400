"""Datasets of trajectories: one file, a folder of files, or the folders that the loop writes."""

import bisect
import functools
import hashlib
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clvr_jax.data import sharegpt
from clvr_jax.data.containers import SUFFIXES, Container, JsonFile, open_container
from clvr_jax.data.index import RecordError
from clvr_jax.data.trajectory import Trajectory
from clvr_jax.data.turns import explain

_WHOLE = 2**26  # bytes up to which a binary file is hashed whole
_BLOCK = 2**20
_RUN_FILE = "trajectory.json"  # the loop writes one in each prompt's folder


class Source:
    """Trajectories by number; nothing but the places of records is held in memory.

    Records may be in the native schema or in ShareGPT. May be read from several threads, and
    pickled.

    Attributes:
      files: the dataset's files, in the order in which they are numbered.
    """

    def __init__(self, files: Sequence[Container]):
        self.files = tuple(files)
        self._ends = list(itertools.accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Trajectory:
        """Return a trajectory; its images can be read from anywhere (`images.read_image`).

        Raises:
          RecordError: its record is broken; the message names file and line.
          IndexError: there is none of that number.
        """
        file, number = self.place(index)
        try:
            record = file.read(number)
            made = to_trajectory(record, f"{file.path.stem}-{number}")
        except RecordError as error:
            raise RecordError(f"{file.where(number)}: {error}") from error
        return made.within(file.path.parent)

    def __iter__(self) -> Iterator[Trajectory]:
        return map(self.__getitem__, range(len(self)))

    def place(self, index: int) -> tuple[Container, int]:
        """Return the file that holds a record and its number in it."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index)
        return self.files[file], index - (self._ends[file - 1] if file else 0)

    def where(self, index: int) -> str:
        """Return the place of a record in words: `file:line`, or `file[number]`."""
        file, number = self.place(index)
        return file.where(number)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the records, the same wherever the files lie and whatever they are called.

        Image files beside the records are not read. Of ArrayRecord and Parquet files beyond 64 MiB
        the size and 64 blocks of 1 MiB, evenly spread, stand for the whole.
        """
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(_digest(file.path, sampled=not isinstance(file, JsonFile)))
        return whole.hexdigest()[:16]


def open_source(path: str | Path, split: str | None = None) -> Source:
    """Return the trajectories at a path.

    Args:
      path: a JSON, JSONL, ArrayRecord or Parquet file, or a folder. Of a folder with such files,
        all are read in the order of their names (they must be of one kind); of a folder without,
        every FOLDER/trajectory.json below it.
      split: of a folder, only the files called like it: train.jsonl, train-00000-of-00004.parquet.

    Raises:
      RecordError: there is nothing to read; a file is not what its suffix says.
      OSError: a file cannot be read.
    """
    files = find_files(path, split)
    return Source([open_container(file) for file in files])


def find_files(path: str | Path, split: str | None = None) -> list[Path]:
    """Return the files that `open_source` reads."""
    path = Path(path)
    if not path.is_dir():
        if split is not None:
            raise RecordError(f"{path} is a file; a split ({split}) is chosen from a folder")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a dataset file or its folder")
        return [path]
    found = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
    if split is not None:
        of_split = [
            file for file in found if re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.stem)
        ]
        if not of_split:
            names = ", ".join(file.name for file in found) or "no dataset files"
            raise RecordError(f"{path} has no files of the split {split}; it holds {names}")
        found = of_split
    if not found:
        found = sorted(path.glob(f"*/{_RUN_FILE}"))
    if not found:
        raise RecordError(
            f"{path} holds no dataset: no file ends in {', '.join(SUFFIXES)}, and no folder in it "
            f"holds {_RUN_FILE}"
        )
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) > 1:
        raise RecordError(f"{path} holds {' and '.join(kinds)} files; name one of them, or a split")
    return found


def to_trajectory(record: dict[str, Any], name: str) -> Trajectory:
    """Return the trajectory of a record in the native schema or in ShareGPT.

    Args:
      record: as a container gives it.
      name: the id of a ShareGPT record that has none.

    Raises:
      RecordError: it is none; its `faults` are all that were found.
    """
    if sharegpt.is_sharegpt(record):
        return sharegpt.from_record(record, name)
    try:
        return Trajectory.model_validate(record)
    except ValidationError as error:
        raise RecordError(*explain(error)) from error


def _digest(path: Path, sampled: bool) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if not sampled or size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        part = hashlib.sha256(str(size).encode())
        for block in range(64):
            file.seek(block * (size - _BLOCK) // 63)
            part.update(file.read(_BLOCK))
        return part.digest()
