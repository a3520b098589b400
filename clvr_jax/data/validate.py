"""Finding every fault of a dataset before anything starts, each with its file and line."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from clvr_jax.data.containers import Container, images_of, open_container
from clvr_jax.data.images import LIMITS, Limits, image_fault
from clvr_jax.data.index import RecordError
from clvr_jax.data.sources import find_files, to_trajectory

_BATCH = 256  # records whose images are looked at together


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
      where: `file:line` of JSON and JSONL, the line on which the record starts, counted from 1;
        `file[number]` of other files, counted from 0; the file alone if it cannot be read.
      what: what is wrong, in words.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was looked at and what was found.

    Attributes:
      records: how many there are.
      images: how many different ones they name.
      faults: all, in the order of the files.
    """

    records: int
    images: int
    faults: tuple[Fault, ...]

    def summary(self) -> str:
        """Return the result in one line."""
        looked = f"{_count(self.records, 'record')}, {_count(self.images, 'image')}"
        if not self.faults:
            return f"{looked}: no faults"
        broken = len({fault.where for fault in self.faults})
        return f"{looked}: {_count(len(self.faults), 'fault')} in {_count(broken, 'place')}"


class InvalidData(ValueError):
    """A dataset with faults; the message lists the first of them.

    Attributes:
      report: all of them.
    """

    def __init__(self, report: Report, shown: int = 20):
        lines = [str(fault) for fault in report.faults[:shown]]
        if len(report.faults) > shown:
            lines.append(f"... and {len(report.faults) - shown} more")
        super().__init__("\n".join([f"the data cannot be used: {report.summary()}", *lines]))
        self.report = report


def validate(
    path: str | Path,
    split: str | None = None,
    limits: Limits = LIMITS,
    full: bool = False,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return all faults of the data at a path.

    Args:
      path: see `sources.open_source`.
      split: see there.
      limits: what an image may be.
      full: whether every picture is decoded; otherwise headers are read, and files decoded whose
        end looks cut off.
      threads: that look at images.
      progress: called with records done and records in all.

    Raises:
      RecordError, OSError: there is no dataset at the path.
    """
    files, faults = [], []
    for file in find_files(path, split):
        try:
            files.append(open_container(file))
        except (RecordError, OSError) as error:
            faults.append(_file_fault(file, error))
    checker = _Checker(limits, full)
    total, done = sum(map(len, files)), 0
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            for start in range(0, len(file), _BATCH):
                numbers = range(start, min(start + _BATCH, len(file)))
                faults += checker.check(file, numbers, pool)
                done += len(numbers)
                if progress is not None:
                    progress(done, total)
    if not total and not faults:
        faults.append(Fault(str(path), "holds no records"))
    return Report(total, len(checker.looked), tuple(faults))


def require_valid(path: str | Path, split: str | None = None, **options: Any) -> Report:
    """Validate, and raise `InvalidData` if there are faults; see `validate`."""
    report = validate(path, split, **options)
    if report.faults:
        raise InvalidData(report)
    return report


class _Checker:
    """What is remembered between records: ids, and images that were looked at."""

    def __init__(self, limits: Limits, full: bool):
        self.limits, self.full = limits, full
        self.looked: dict[str, str | None] = {}
        self.ids: dict[str, str] = {}

    def check(self, file: Container, numbers: range, pool: ThreadPoolExecutor) -> list[Fault]:
        """Return the faults of some records of a file."""
        found: list[tuple[int, str]] = []
        images: list[tuple[int, int, str, str]] = []
        for number in numbers:
            try:
                record = file.read(number)
                images += self._images(file, number, record)
                found += [(number, fault) for fault in self._record(file, number, record)]
            except RecordError as error:
                found += [(number, fault) for fault in error.faults]
        # one image may belong to many records; it is looked at once
        new = list({path: None for *_, path in images if path not in self.looked})
        look = lambda path: image_fault(path, self.limits, self.full)
        self.looked.update(zip(new, pool.map(look, new)))
        for number, place, name, path in images:
            if self.looked[path] is not None:
                found.append((number, f"image {place} ({name}) {self.looked[path]}"))
        found.sort(key=lambda fault: fault[0])
        return [Fault(file.where(number), what) for number, what in found]

    def _record(self, file: Container, number: int, record: dict[str, Any]) -> Iterator[str]:
        try:
            made = to_trajectory(record, f"{file.path.stem}-{number}")
        except RecordError as error:
            yield from error.faults
            return
        first = self.ids.setdefault(made.id, file.where(number))
        if first != file.where(number):
            yield f"the id {made.id!r} is taken by {first}"

    def _images(
        self, file: Container, number: int, record: dict[str, Any]
    ) -> Iterator[tuple[int, int, str, str]]:
        """Yield (record, place counted from 1, name, path) of the images that a record names."""
        folder = file.path.parent.absolute()
        for place, image in enumerate(images_of(record), 1):
            if isinstance(image, str) and image:  # what is none is the schema's to refuse
                yield number, place, image, str(folder / image)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _file_fault(file: Path, error: Exception) -> Fault:
    text = str(error)
    if isinstance(error, OSError):
        return Fault(str(file), f"cannot be read: {error.strerror or error}")
    if text.startswith(f"{file}:"):  # with its line
        line, _, what = text[len(str(file)) + 1 :].partition(": ")
        return Fault(f"{file}:{line}", what)
    return Fault(str(file), text.removeprefix(f"{file} "))
