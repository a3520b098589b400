"""The turns that are being generated together: rows come, go, and get more places."""

import jax
import numpy as np

from clvr_jax.backends.local import grammar
from clvr_jax.backends.local.sequence import bucket, power
from clvr_jax.backends.local.work import Work
from clvr_jax.generate import text
from clvr_jax.models.qwen3.cache import KV
from clvr_jax.typing import Params


class Batch:
    """Rows on the device and the turns they belong to.

    The number of rows is a power of two and the places are a bucket, so that few programs are
    compiled. A lone sequence's cache is taken as it is and given back as it is.

    Args:
      nets: the networks.
      params: the language model's parameters.
    """

    def __init__(self, nets: text.Networks, params: Params):
        self._nets, self._params = nets, params
        self._vocab = nets.language.cfg.vocab
        self._rows: text.Rows | None = None
        self._slots: list[Work | None] = []

    @property
    def works(self) -> list[Work]:
        """The turns in it."""
        return [work for work in self._slots if work is not None]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and places that exist now."""
        rows = self._rows  # once: other threads ask while the engine's changes it
        if rows is None:
            return 0, 0
        keys = rows.cache[0].keys
        return keys.shape[0], keys.shape[2]

    @property
    def broken(self) -> bool:
        """Whether a failed call has taken rows with it."""
        return self._rows is not None and any(x.is_deleted() for x in jax.tree.leaves(self._rows))

    def needs(self, work: Work | None = None) -> tuple[int, int]:
        """Return rows, and places of all rows, that the turns and one more may come to need."""
        count, have = self.size
        most = [w.grown for w in self.works]
        if work is not None:
            most.append(work.alone)
        rows = power(len(most)) if most else 0
        return rows, max(rows * max(most, default=0), count * have)

    def add(self, work: Work, scores, cache: tuple[KV, ...]) -> None:
        """Take in a turn whose conversation has been read."""
        one = text.settle(work.row(scores, self._vocab, cache))
        places = cache[0].keys.shape[2]
        if self._rows is None:
            self._rows, self._slots = one, [work]
            return
        _, have = self.size
        if None not in self._slots or places > have:
            self._pack(len(self.works) + 1, places)
        at = self._slots.index(None)
        self._rows = text.insert(self._rows, one, at)
        self._slots[at] = work

    def step(self, tokens: int) -> text.Tokens:
        """Generate up to so many tokens for every turn; return them on the host."""
        works = self.works
        constrained = any(work.matcher is not None for work in works)
        tokens = 1 if constrained else min(tokens, text.CHUNK)
        longest = max(work.sequence.cached for work in works)
        _, have = self.size
        if longest + tokens > have:
            self._pack(len(works))
        rivals = max((work.options.logprobs or 0 for work in works), default=0)
        self._rows, out = text.decode(
            self._nets,
            self._params,
            self._rows,
            tokens,
            np.array([work is not None for work in self._slots]),
            self._masks() if constrained else None,
            rivals=power(rivals) if rivals else 0,
        )
        return text.Tokens(*(np.asarray(leaf) for leaf in vars(out).values()))

    def slot(self, work: Work) -> int:
        """Return the row of a turn."""
        return self._slots.index(work)

    def remove(self, work: Work, keep: bool) -> tuple[KV, ...] | None:
        """Let a turn go; return its cache if it is to be kept."""
        at = self._slots.index(work)
        self._slots[at] = None
        if not self.works:
            rows, self._rows, self._slots = self._rows, None, []
            if keep and len(rows.lengths) == 1:
                return rows.cache
        else:
            rows = self._rows
        if not keep:
            return None
        have = rows.cache[0].keys.shape[2]
        return text.extract(rows.cache, at, min(bucket(work.sequence.cached), have))

    def shrink(self, tight: bool = False) -> None:
        """Give up rows that few turns would leave empty; if `tight`, places as well."""
        count, have = self.size
        works = self.works
        if not works:
            return
        longest = max(work.sequence.cached for work in works)
        if power(len(works)) < count or (tight and bucket(longest + text.CHUNK) < have):
            self._pack(len(works))

    def clear(self) -> None:
        """Forget all rows, e.g. after a failed call took them with it."""
        self._rows, self._slots = None, []

    def _pack(self, turns: int, least: int = 0) -> None:
        """Bring the turns, and free rows for as many as are said, into as little as they take."""
        index = [i for i, work in enumerate(self._slots) if work is not None]
        index += [-1] * (power(turns) - len(index))
        longest = max(work.sequence.cached for work in self.works)
        places = max(bucket(longest + text.CHUNK), least)
        self._rows = text.regroup(self._rows, np.array(index, np.int32), places)
        self._slots = [self._slots[i] if i >= 0 else None for i in index]

    def _masks(self) -> np.ndarray:
        masks = grammar.free(len(self._slots), self._vocab)
        for i, work in enumerate(self._slots):
            if work is not None and work.mask is not None:
                masks[i] = work.mask
        return masks
