"""Making the features that training reads; what is there already is not made again."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from clvr_jax.data.loader import load, stack
from clvr_jax.data.plan import FILLING, Step, filled
from clvr_jax.generate.image import Networks
from clvr_jax.generate.prompt import tokenize
from clvr_jax.sft.image.features import Features, Spec
from clvr_jax.sft.image.loss import encode_pictures, encode_text
from clvr_jax.sft.image.pictures import read_pixels
from clvr_jax.sft.image.samples import Rules, Sample
from clvr_jax.typing import Params
from clvr_jax.weights import WeightsError


class Item(NamedTuple):
    """Features to be made: of a text (ids and length) or a picture."""

    key: str
    spec: Spec
    of: Any


class Work(NamedTuple):
    """What is missing.

    Attributes:
      items: features to be made.
      bytes: size of the files that they will be, to the byte.
      there: features that lie there already.
    """

    items: list[Item]
    bytes: int
    there: int

    def __str__(self) -> str:
        texts = sum(item.key.startswith("text") for item in self.items)
        return (
            f"{texts} text features and {len(self.items) - texts} latents to make, "
            f"{self.bytes:,} bytes ({self.bytes / 1e9:.2f} GB); {self.there} are there"
        )


def missing(
    features: Features,
    source: Any,
    samples: list[Sample],
    tokenizer: Any,
    rules: Rules,
    *,
    empty: bool = False,
    threads: int = 8,
    part: tuple[int, int] = (0, 1),
) -> Work:
    """Return what has to be made for these samples; reads every image file once.

    Args:
      features: the folder.
      source, samples, tokenizer, rules: what is trained on, as `Batches` takes them.
      empty: whether the empty text is needed, for dropout.
      threads: samples looked at the same time.
      part: number of this process, and how many share the work; each makes its own part.
    """

    def look(sample: Sample) -> list[Item]:
        specs = features.specs(sample.static)
        inputs = rules.inputs(source[sample.trajectory], sample.step)
        found = []
        for text in (inputs.text, "") if empty else (inputs.text,):
            ids, lengths = tokenize(tokenizer, [text], sample.static.text)
            key = features.text_key(ids[0], int(lengths[0]))
            found.append(Item(key, specs[0], (ids[0], lengths[0])))
        for picture, spec in zip((inputs.target, *inputs.references), specs[1:], strict=True):
            found.append(Item(features.picture_key(picture), spec, picture))
        return found

    with ThreadPoolExecutor(threads) as pool:
        every = {item.key: item for found in pool.map(look, samples) for item in found}
    # shared out by name: what others have written meanwhile must not change who makes what
    mine = [every[key] for key in sorted(every)[part[0] :: part[1]]]
    absent = [item for item in mine if not features.file(item.key).exists()]
    size = sum(features.file_size(item.spec) for item in absent)
    return Work(absent, size, len(mine) - len(absent))


def make(
    features: Features,
    work: Work,
    networks: Networks,
    frozen: dict[str, Params],
    factor: int,
    *,
    rows: int = 1,
    threads: int = 4,
    say: Callable[[str], None] = print,
) -> None:
    """Make what is missing, having said how large it is; may be stopped and begun again.

    Args:
      features: the folder.
      work: from `missing`.
      networks: as in training.
      frozen: parameters of `text_encoder` and `vae`, which this process must hold in full.
      factor: the VAE's, of the buckets.
      rows: texts or pictures that go through a network at once.
      threads: read and write at the same time.
      say: is told the size before anything is made.

    Raises:
      ValueError: the parameters are of another type than the features.
      WeightsError: the disk has too little room for all of it; nothing was made.
      LoadError: a picture cannot be read.
    """
    for name in ("text_encoder", "vae"):
        dtype = jax.tree.leaves(frozen[name])[0].dtype
        if dtype != features.dtype:
            raise ValueError(f"{name} is {dtype}, its features are to be {features.dtype}")
    there = next(p for p in (features.folder, *features.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    say(f"{work} into {features.folder}, where {free / 1e9:.2f} GB are free")
    if work.bytes > free:
        found, expected = f"{free / 1e9:.2f} GB free", f"{work.bytes / 1e9:.2f} GB"
        raise WeightsError(features.folder, None, found, expected, "free some, or write elsewhere")

    text = jax.jit(lambda params, *given: encode_text(networks, params, *given))
    latents = jax.jit(lambda params, pixels: encode_pictures(networks, params, [pixels])[0])

    def read(step: Step) -> dict[str, np.ndarray]:
        items = [None if i == FILLING else work.items[i].of for i in step.rows.flat]
        kind, size = step.static
        if kind == "latents":
            pixels = [None if item is None else read_pixels(item, factor) for item in items]
            return {"pixels": stack(pixels, (len(items),), ((*size, 3), np.uint8))}
        ids, lengths = zip(*(item or items[0] for item in items))
        return {"ids": np.stack(ids), "lengths": np.array(lengths, np.int32)}

    steps = _steps(work.items, rows)
    with load(steps, read, threads=threads) as batches, ThreadPoolExecutor(threads) as pool:
        writing: list[Any] = []
        for at, (kind, _), arrays in batches:
            if kind == "text":
                made = text(frozen["text_encoder"], arrays["ids"], arrays["lengths"])
            else:
                made = latents(frozen["vae"], arrays["pixels"])
            for previous in writing:  # the device is busy with the next ones meanwhile
                previous.result()
            items = [work.items[i] for i in steps[at].rows.flat if i != FILLING]
            writing = [
                pool.submit(features.write, item.key, array)
                for item, array in zip(items, np.asarray(made))
            ]
        for last in writing:
            last.result()


def _steps(items: list[Item], rows: int) -> list[Step]:
    """Items of one kind and size together, `rows` at a time."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, item in enumerate(items):
        kind = item.key.split("/")[0]
        size = item.of.size if kind == "latents" else (len(item.of[0]),)
        groups.setdefault((kind, size), []).append(i)
    return [
        Step(key, filled(group[n * rows : (n + 1) * rows], 1, rows))
        for key, group in groups.items()
        for n in range(math.ceil(len(group) / rows))
    ]
