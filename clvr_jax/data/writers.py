"""Writing datasets: JSONL with image files beside it, ArrayRecord with them inside.

A file appears under its name when it is complete; nothing is overwritten.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from clvr_jax.data import sharegpt
from clvr_jax.data.containers import is_embedded
from clvr_jax.data.images import read_bytes
from clvr_jax.data.trajectory import Trajectory

Form = Literal["native", "conversations", "messages"]
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}


def write_jsonl(
    path: Path,
    trajectories: Iterable[Trajectory],
    form: Form = "native",
    copy_images: bool = False,
) -> int:
    """Write one record a line and return how many.

    Image files that lie inside a dataset file, with `copy_images` all others too, are written to
    the folder NAME_images beside `path`. The others stay where they are, named relative to the
    folder of `path` if they lie below it, else by their absolute paths.

    Raises:
      FileExistsError: `path` or the folder for images exists.
      OSError, ValueError: an image cannot be read.
    """
    pictures = path.parent / f"{path.stem}_images"
    if pictures.exists():
        raise FileExistsError(f"{pictures} exists; choose another name, or remove it")
    count = 0
    with _aside(path) as partial:
        try:
            with partial.open("w", encoding="utf-8") as out:
                for index, made in enumerate(trajectories):
                    images = []
                    for number, step in enumerate(made.steps, 1):
                        if copy_images or is_embedded(step.image):
                            data = read_bytes(step.image)
                            file = pictures / f"{index:06d}" / f"{number}{_ending(data)}"
                            file.parent.mkdir(parents=True, exist_ok=True)
                            file.write_bytes(data)
                            images.append(str(file.relative_to(path.parent)))
                        else:
                            images.append(_name(step.image, path.parent))
                    record = to_record(made.with_images(images), form)
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += 1
        except BaseException:
            shutil.rmtree(pictures, ignore_errors=True)
            raise
    return count


def write_array_record(
    path: Path, trajectories: Iterable[Trajectory], form: Form = "native", embed: bool = True
) -> int:
    """Write one record a trajectory, with its image files inside or named; return how many.

    Raises:
      FileExistsError: `path` exists.
      OSError, ValueError: an image cannot be read, or the file not be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with _aside(path) as partial:
        # one record a group: reading one reads no neighbours; pictures are compressed already
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            try:
                for made in trajectories:
                    writer.write(_packed(made, form, embed, path.parent))
                    count += 1
            finally:
                writer.close()
        except RuntimeError as error:  # the library's, e.g. for a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
    return count


def to_record(trajectory: Trajectory, form: Form) -> dict[str, Any]:
    """Return a trajectory as JSON values: in the native schema, or in a variant of ShareGPT."""
    return trajectory.record() if form == "native" else sharegpt.to_record(trajectory, form)


def _packed(made: Trajectory, form: Form, embed: bool, folder: Path) -> bytes:
    if not embed:
        named = made.with_images([_name(step.image, folder) for step in made.steps])
        return json.dumps(to_record(named, form), ensure_ascii=False).encode()
    files = [read_bytes(step.image) for step in made.steps]
    names = [f"{number}{_ending(data)}" for number, data in enumerate(files, 1)]
    record = to_record(made.with_images(names), form)
    record["image_bytes"] = [len(data) for data in files]
    return b"\0".join([json.dumps(record, ensure_ascii=False).encode(), b"".join(files)])


def _name(image: str, folder: Path) -> str:
    base = str(folder.absolute())
    return os.path.relpath(image, base) if image.startswith(base + os.sep) else image


def _ending(data: bytes) -> str:
    return next((end for start, end in _ENDINGS.items() if data.startswith(start)), ".image")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a name to write to; rename it to `path` at the end, remove it after an error."""
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
