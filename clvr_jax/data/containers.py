"""Files that hold many records, read one record at a time: JSON, JSONL, ArrayRecord, Parquet.

A record comes as a dictionary, its images either as paths or as places inside its file
(`FILE#record/image`, both counted from 0), which `clvr_jax.data.images` reads like paths.

An ArrayRecord record is UTF-8 JSON, alone or followed by a zero byte and the bytes of its image
files; then its "image_bytes" lists their sizes, in the order of the record's images. Parquet tables
have the same columns as JSON has fields, images as paths or as {"bytes", "path"}, the form that
Hugging Face datasets store.
"""

import bisect
import functools
import itertools
import re
import threading
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clvr_jax.data.index import RecordError, decode, json_places, jsonl_places

SUFFIXES = (".json", ".jsonl", ".array_record", ".arrayrecord", ".parquet")
_EMBEDDED = re.compile(r"(.+\.(?:array_record|arrayrecord|parquet))#(\d+)/(\d+)")
_one_at_a_time = threading.Lock()


@runtime_checkable
class Container(Protocol):
    """One file of records.

    Attributes:
      path: where it lies.
    """

    path: Path

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Any]:
        """Return a record; raise RecordError, without its place, if it is none."""
        ...

    def where(self, index: int) -> str:
        """Return the place of a record: `file:line`, or `file[number]` counted from 0."""
        ...


def open_container(path: Path) -> Container:
    """Return the reader for a file, by its suffix.

    Raises:
      RecordError: the suffix is unknown, or the file is not what its suffix says.
      OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RecordError(
            f"{path} is no dataset file; its name must end in {' or '.join(SUFFIXES)}"
        )
    with path.open("rb"):  # a plain error if it cannot be read; libraries have others
        pass
    if suffix in (".json", ".jsonl"):
        return JsonFile(path)
    return ParquetFile(path) if suffix == ".parquet" else ArrayRecordFile(path)


class JsonFile:
    """JSONL, a JSON array of records, or one record; only the places of records are in memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            find = jsonl_places if path.suffix.lower() == ".jsonl" else json_places
            self._places = find(path)
        except RecordError as error:
            raise RecordError(f"{path}:{error}") from error

    def __len__(self) -> int:
        return len(self._places.starts)

    def read(self, index: int) -> dict[str, Any]:
        start, end = int(self._places.starts[index]), int(self._places.ends[index])
        with self.path.open("rb") as file:
            file.seek(start)
            return decode(file.read(end - start))

    def where(self, index: int) -> str:
        return f"{self.path}:{self._places.lines[index]}"


class ArrayRecordFile:
    """ArrayRecord; image files lie inside the records, or their paths do."""

    def __init__(self, path: Path):
        self.path = path
        self._count = _array_reader(str(path)).num_records()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> dict[str, Any]:
        header, sizes, _ = self._parts(index)
        if sizes is None:
            return header
        places = [f"{self.path.absolute()}#{index}/{number}" for number in range(len(sizes))]
        return with_images(header, places)

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def image(self, index: int, number: int) -> bytes:
        """Return an image file that lies inside a record."""
        _, sizes, blobs = self._parts(index)
        start = sum(sizes[:number])
        return blobs[start : start + sizes[number]]

    def _parts(self, index: int) -> tuple[dict[str, Any], list[int] | None, bytes]:
        text, _, blobs = _array_record(str(self.path), index).partition(b"\0")
        record = decode(text)
        sizes = record.pop("image_bytes", None)
        if sizes is None:
            return record, None, b""
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise RecordError(f"image_bytes is {sizes!r}; it must list the sizes of the images")
        if sum(sizes) != len(blobs):
            raise RecordError(f"image_bytes says {sum(sizes)} bytes, the record has {len(blobs)}")
        return record, sizes, blobs


class ParquetFile:
    """Parquet, read by row groups; needs pyarrow."""

    def __init__(self, path: Path):
        self.path = path
        file = _parquet(str(path))
        rows = (file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))
        self._ends = list(itertools.accumulate(rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        found = enumerate(images_of(row))
        return with_images(row, [self._place(index, number, image) for number, image in found])

    def where(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def image(self, index: int, number: int) -> bytes:
        """Return an image file that lies inside a row."""
        return images_of(self._row(index))[number]["bytes"]

    def _row(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        rows = _parquet_rows(str(self.path), group).slice(index - first, 1)
        return _without_none(rows.to_pylist()[0])

    def _place(self, index: int, number: int, image: Any) -> Any:
        if not isinstance(image, dict):
            return image
        inside = f"{self.path.absolute()}#{index}/{number}"
        return inside if "bytes" in image else image.get("path")


def is_embedded(image: str) -> bool:
    """Return whether an image's name is a place inside a dataset file."""
    return _EMBEDDED.fullmatch(image) is not None


def embedded(image: str) -> bytes | None:
    """Return the image file at a place inside a dataset file; None if `image` is a plain path.

    Raises:
      RecordError: there is none at that place.
      OSError: the dataset file cannot be read.
    """
    found = _EMBEDDED.fullmatch(image)
    if not found:
        return None
    container, record, number = _container(found[1]), int(found[2]), int(found[3])
    try:
        if record < len(container):
            return container.image(record, number)
    except (IndexError, KeyError, TypeError):  # the record has no such image, or none inside
        pass
    raise RecordError(f"does not exist: {found[1]} holds no image {record}/{number}")


def images_of(record: dict[str, Any]) -> list[Any]:
    """Return the images that a record lists, in order, as they stand there."""
    if isinstance(record.get("steps"), list):
        return [step.get("image") for step in record["steps"] if isinstance(step, dict)]
    images = record.get("images")
    return list(images) if isinstance(images, list) else []


def with_images(record: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    """Return a record that lists other images, as many as before.

    Raises:
      RecordError: the numbers differ.
    """
    if len(images) != len(images_of(record)):
        raise RecordError(f"lists {len(images_of(record))} images, and holds {len(images)}")
    if isinstance(record.get("steps"), list):
        rest = iter(images)
        steps = [s | {"image": next(rest)} if isinstance(s, dict) else s for s in record["steps"]]
        return record | {"steps": steps}
    return record | {"images": images} if "images" in record else record


@functools.lru_cache(maxsize=64)
def _container(path: str) -> Any:
    return open_container(Path(path))


@functools.lru_cache(maxsize=64)
def _array_reader(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # records are asked for in any order: reading ahead would be thrown away
    reader = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise RecordError(f"{path} is no ArrayRecord file, or it is cut off")
    return reader


@functools.lru_cache(maxsize=16)  # the images of one record are read one after another
def _array_record(path: str, index: int) -> bytes:
    try:
        return _array_reader(path).read([index])[0]
    except RuntimeError as error:
        _array_reader.cache_clear()  # a reader that failed once fails for every record
        raise RecordError(f"is damaged: {error}") from error


@functools.lru_cache(maxsize=64)
def _parquet(path: str) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise RecordError(
            f"{path}: reading Parquet needs pyarrow; pip install 'clvr_jax[parquet]', or convert "
            "the data to JSONL where it is installed"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise RecordError(f"{path} is no Parquet file: {error}") from error


@functools.lru_cache(maxsize=4)
def _parquet_rows(path: str, group: int) -> Any:
    with _one_at_a_time:  # pyarrow's readers are not made for several threads
        return _parquet(path).read_row_group(group)


def _without_none(value: Any) -> Any:
    """Drop fields without a value: all rows of a table have the same ones."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
