"""A conversation as tokens, and where its keys and values are."""

import dataclasses
import itertools

from clvr_jax.models.qwen3.cache import KV
from clvr_jax.models.qwen3_vl.processor import Picture, Turn

_SMALLEST = 128
_serial = itertools.count()


def bucket(tokens: int) -> int:
    """Return the cache places for so many tokens: powers of two and their halves-over, from 128.

    Few sizes, so that few programs are compiled, and at most half of a row unused.
    """
    size = _SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def power(count: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `count` and `least`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


@dataclasses.dataclass(eq=False)
class Sequence:
    """The raw ids of one conversation; only ever appended to, but for a failed turn.

    Attributes:
      ids: token ids as read and sampled, never re-tokenised.
      pictures: (index of the first image token, picture) in order.
      cached: ids from the first on whose keys and values are in the cache.
      position: M-RoPE position of the token after those.
      cache: one row of keys and values, None where it was evicted or lies in the batch.
      running: a turn is being generated.
      closed: nobody will ask again.
      used: when it was used last, in no unit.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    pictures: list[tuple[int, Picture]] = dataclasses.field(default_factory=list)
    cached: int = 0
    position: int = 0
    cache: tuple[KV, ...] | None = None
    running: bool = False
    closed: bool = False
    used: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def touch(self) -> None:
        """Note that it was used just now."""
        self.used = next(_serial)

    def mark(self) -> tuple[int, int, int, int]:
        """Return what `back_to` needs to forget what comes now."""
        return len(self.ids), len(self.pictures), self.cached, self.position

    def back_to(self, mark: tuple[int, int, int, int]) -> None:
        """Forget what came after a mark."""
        ids, pictures, cached, position = mark
        del self.ids[ids:], self.pictures[pictures:]
        if self.cached > cached:
            self.cached, self.position = cached, position

    def append(self, turn: Turn) -> None:
        """Add the tokens and pictures of a new turn."""
        start = len(self.ids)
        self.ids.extend(turn.ids.tolist())
        self.pictures.extend((start + at, picture) for at, picture in turn.pictures)

    def evict(self) -> None:
        """Give up the cache; the next turn reads the conversation anew."""
        self.cache, self.cached, self.position = None, 0, 0

    def again(self) -> None:
        """Make the last token the next to read, so that the scores after it are computed anew."""
        if self.cached == len(self.ids):
            self.cached, self.position = self.cached - 1, self.position - 1
