"""Picture files of a run: references in, PNG with metadata out."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from clvr_jax import __version__
from clvr_jax.generate import references


class Batch(NamedTuple):
    """Prompts and seeds of one call; every prompt is drawn with every seed."""

    prompts: list[str]
    seeds: list[int]


def batches(prompts: Sequence[str], seeds: Sequence[int], size: int) -> Iterator[Batch]:
    """Yield calls of at most `size` pictures: several seeds of one prompt, or several prompts."""
    if len(seeds) >= size:
        for prompt in prompts:
            for i in range(0, len(seeds), size):
                yield Batch([prompt], list(seeds[i : i + size]))
        return
    together = max(size // len(seeds), 1)
    for i in range(0, len(prompts), together):
        yield Batch(list(prompts[i : i + together]), list(seeds))


def flat(images: np.ndarray, batch: Batch) -> Iterator[tuple[np.ndarray, str, int]]:
    """Yield (picture, prompt, seed) of a call's result (prompts, seeds, height, width, 3)."""
    for row, prompt in zip(images, batch.prompts, strict=True):
        for image, seed in zip(row, batch.seeds, strict=True):
            yield image, prompt, seed


def read_references(paths: Sequence[str], factor: int) -> list[np.ndarray]:
    """Return reference pictures as the VAE takes them.

    Raises:
      ValueError: a file is no picture, too small, or too narrow; the message names it.
    """
    prepared = []
    for path in paths:
        try:
            with Image.open(path) as image:
                prepared.append(references.prepare(image, factor))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is no picture that can be read") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return prepared


def write_png(path: Path, image: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Write a picture with its metadata as PNG text, aside and then renamed."""
    info = PngInfo()
    info.add_text("Software", f"clvr_jax {__version__}")
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with _aside(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=info)


def write_grid(path: Path, images: Sequence[np.ndarray], columns: int | None) -> None:
    """Write all pictures as one; as square as possible unless `columns` is given."""
    columns = columns or int(np.ceil(len(images) ** 0.5))
    write_png(path, references.grid(np.stack(images), columns), {})


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it."""
    with _aside(path) as partial:
        partial.write_text(text)


class _aside:
    """A temporary sibling that becomes `path` unless an exception passes."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.partial

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)
