"""Conversations as the tokens that the model is trained on, on the host.

The tokens are those of inference, turn by turn: what the assistant says is tokenised on its own and
closed, as a session holds sampled ids, and what lies between is rendered by `Processor.later`. The
loss is on what the assistant says and on the token that closes its turn; neither on the header
before nor on the newline behind, which inference writes itself.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clvr_jax.data.images import image_size, read_image
from clvr_jax.data.packing import Size
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.model import position_ids
from clvr_jax.models.qwen3_vl.processor import Picture, Processor

# objects with `role` and `parts`, as `Trajectory.messages` and the backends' protocol have them; a
# part is a text, a PIL image, or names what `data.images` reads in its field `image`
Messages = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation as tokens.

    Attributes:
      ids: (l,) token ids, every image as many times its token as it has cells.
      trained: (l,) bool, tokens that the model learns to say.
      positions: (l, 3) along time, height and width.
      pictures: (index of its first token, image) of every image, in order.
    """

    ids: np.ndarray
    trained: np.ndarray
    positions: np.ndarray
    pictures: tuple[tuple[int, Picture], ...]

    @property
    def size(self) -> Size:
        """What it needs of a row."""
        patches = [len(picture.patches) for _, picture in self.pictures]
        return Size(len(self.ids), len(patches), max(patches, default=0))


def encode(messages: Messages, processor: Processor, cfg: Qwen3VLConfig) -> Example:
    """Return a conversation as tokens; reads, resizes and cuts its pictures.

    It ends with the assistant's last message: from what follows that, nothing is learnt.

    Args:
      messages: the conversation.
      processor: of the checkpoint.
      cfg: sizes and special tokens.

    Raises:
      ValueError: the assistant says nothing, or twice in a row, or a token that is no text; the
        template refuses the conversation; a picture cannot be read.
    """
    return _encode(messages, processor, cfg, read_image)


def spread(example: Example, rng: np.random.Generator, longest: int) -> Example:
    """Return a conversation with gaps in its positions, as if more had been said between its turns.

    Rotary positions that a model has never seen tell it nothing: where rows end, what it says falls
    apart. So it sees them in rows that are shorter than conversations are (Zhu et al., PoSE,
    arXiv:2309.10400). Half of the conversations are left as they are.

    Args:
      example: stays as it is where it has a single turn.
      rng: decides how far.
      longest: positions that all of it may take; no fewer than it takes are.
    """
    after = np.flatnonzero(example.trained[:-1] & ~example.trained[1:]) + 1  # an answer
    free = longest - 1 - int(example.positions.max())
    if not len(after) or free < 1 or rng.random() < 0.5:
        return example
    total = int(rng.integers(1, free + 1))
    gaps = np.diff(np.sort(rng.integers(0, total + 1, len(after) - 1)), prepend=0, append=total)
    moved = np.zeros_like(example.positions)
    moved[after] = gaps[:, None]
    positions = example.positions + np.cumsum(moved, axis=0, dtype=moved.dtype)
    return dataclasses.replace(example, positions=positions)


def sizes(
    count: int,
    messages: Callable[[int], Messages],
    processor: Processor,
    cfg: Qwen3VLConfig,
    *,
    threads: int = 8,
) -> list[Size]:
    """Return what each of many conversations needs of a row; of pictures only headers are read.

    Args:
      count: conversations.
      messages: returns one by its index; called from several threads.
      processor, cfg: as in `encode`.
      threads: read and tokenise at the same time.

    Raises:
      ValueError: see `encode`; names the conversation by its index.
    """
    measuring = _Measuring(processor)

    def size(index: int) -> Size:
        try:
            return _encode(messages(index), measuring, cfg, image_size).size
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}") from error

    if not count:
        return []
    # the first alone: it resets a tokenizer whose file says to cut or to pad
    first = size(0)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return [first, *pool.map(size, range(1, count))]


class _Measuring(Processor):
    """A processor whose pictures have the right sizes and no content."""

    def __init__(self, processor: Processor):
        p = processor
        super().__init__(p.tokenizer, p.template, p.images, p.stops, p.options)

    def picture(self, image: tuple[int, int] | Image.Image) -> Picture:
        """Return the patches that an image, or one of this width and height, would be cut into."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if self.images is None:
            raise ValueError("this model reads text only")
        upright = image if isinstance(image, tuple) else ImageOps.exif_transpose(image).size
        edge, limits = self.images.patch_size, self.images.size
        sides = smart_resize(
            *upright[::-1],
            factor=edge * self.images.merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
        rows, cols = (side // edge for side in sides)
        return Picture(np.broadcast_to(np.uint8(0), (rows * cols, 1)), (rows, cols))


def _encode(messages, processor, cfg, read: Callable[[str], Any]) -> Example:
    ids, trained, pictures = [], [], []
    known = lambda part: part if isinstance(part, (str, Image.Image)) else read(part.image)
    for given, said in _turns(messages):
        given = [{"role": m.role, "parts": [known(part) for part in m.parts]} for m in given]
        turn = processor.later(given, ended=True) if ids else processor.first(given)
        pictures += [(len(ids) + at, picture) for at, picture in turn.pictures]
        words = _words(said, processor, cfg)
        ids += [*turn.ids.tolist(), *words, processor.close]
        trained += [False] * len(turn.ids) + [True] * (len(words) + 1)
    if not ids:
        raise ValueError("the conversation has no assistant message; nothing is learnt from it")
    positions, _ = position_ids(np.array(ids), [picture.grid for _, picture in pictures], cfg)
    return Example(np.array(ids, np.int32), np.array(trained), positions, tuple(pictures))


def _turns(messages: Messages) -> Iterator[tuple[list[Any], str]]:
    """Every assistant message as text, and the messages since the one before."""
    given = []
    for message in messages:
        if message.role != "assistant":
            given.append(message)
            continue
        if not given:
            raise ValueError("an assistant message stands first or follows another; merge them")
        if not all(isinstance(part, str) for part in message.parts):
            raise ValueError("an assistant message holds a picture; pictures are the user's")
        yield given, "".join(message.parts)
        given = []


def _words(text: str, processor: Processor, cfg: Qwen3VLConfig) -> list[int]:
    words = processor.tokenizer.encode(text, add_special_tokens=False)
    marks = {cfg.image_token, cfg.video_token, cfg.vision_start, cfg.vision_end, *processor.stops}
    found = sorted(marks.intersection(words))
    if found:
        names = ", ".join(processor.tokenizer.convert_ids_to_tokens(found))
        raise ValueError(f"an assistant message holds {names}, which is no text")
    return words
