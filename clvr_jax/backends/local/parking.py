"""Conversations that wait for their next turn, and keep their caches while memory lasts."""

from clvr_jax.backends.local.sequence import Sequence
from clvr_jax.models.qwen3 import cache


class Parking:
    """Waiting sequences; the least recently used is the first to lose its cache.

    Attributes:
      evictions: how often that happened.
    """

    def __init__(self):
        self._sequences: set[Sequence] = set()
        self.evictions = 0

    def add(self, seq: Sequence) -> None:
        """Keep a sequence that was used just now."""
        seq.touch()
        self._sequences.add(seq)

    def discard(self, seq: Sequence) -> None:
        """Let a sequence go, with its cache, if it is here."""
        self._sequences.discard(seq)

    def nbytes(self) -> int:
        """Return the bytes of all caches; may be asked from any thread."""
        return sum(cache.nbytes(seq.cache) for seq in tuple(self._sequences))

    def shrink(self, size: int) -> None:
        """Evict until all caches together take at most so many bytes, or none is left."""
        for seq in sorted(self._sequences, key=lambda seq: seq.used):
            if self.nbytes() <= size:
                return
            self._sequences.discard(seq)
            seq.evict()
            self.evictions += 1

    def clear(self) -> None:
        """Evict all, e.g. when the model is closed."""
        while self._sequences:
            self._sequences.pop().evict()
