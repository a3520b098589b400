"""Output that appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clvr_jax.weights.header import WeightsError


@contextmanager
def staging(target: Path, size: int, *, folder: bool) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which takes its place when the block ends.

    After an error nothing of it is left, nor are the parents that had to be made. Into a folder
    that exists already the files are moved one by one, an index after its shards.

    Args:
      target: what is to be written.
      size: bytes that it will hold.
      folder: whether it is a folder, or a file.

    Raises:
      WeightsError: the disk has not that much room.
    """
    target = Path(os.path.abspath(target))
    exists = folder and target.is_dir()
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # inside a folder that exists, because that may be a mount point of its own
    place = target if exists else target.parent
    temporary = place / f".{target.name}.{os.getpid()}.partial"
    try:
        free = shutil.disk_usage(place).free
        if size > free:
            found, expected = f"{free / 1e9:.2f} GB free", f"{size / 1e9:.2f} GB"
            raise WeightsError(target, None, found, expected, "free some, or write elsewhere")
        _remove(temporary)  # left by a killed process that had this number
        if folder:
            temporary.mkdir()
        yield temporary
        if exists:
            for file in sorted(temporary.iterdir(), key=lambda f: (f.suffix == ".json", f.name)):
                os.replace(file, target / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, target)
        sync(place)
    except BaseException:
        _remove(temporary)
        with suppress(OSError):  # someone else may have put something there meanwhile
            for parent in made:
                parent.rmdir()
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
