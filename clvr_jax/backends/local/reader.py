"""Reading: the part of a conversation that is not cached yet, in pieces of few sizes."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from clvr_jax.backends.local.sequence import Sequence, bucket, power
from clvr_jax.generate import text
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.model import position_ids
from clvr_jax.models.qwen3_vl.processor import Picture
from clvr_jax.typing import Params

PIECE = 2048  # tokens that one program reads at most


def cache_places(context: int, conversations: int = 1) -> int:
    """Return the cache places of conversations of at most `context` tokens, while one is read."""
    return bucket(context) * (conversations - 1) + bucket(context + PIECE)


_LEAST = 16  # tokens of the shortest program
_LEAST_PATCHES = 64


class Reader:
    """Fills the caches of sequences.

    Args:
      nets: the networks.
      params: `{"language": ..., "visual": ...}`.
      cfg: sizes of both, None for text-only models.
      levels: (channel, 256) normalised grey levels, None for text-only models.
    """

    def __init__(
        self,
        nets: text.Networks,
        params: Params,
        cfg: Qwen3VLConfig | None,
        levels: np.ndarray | None,
    ):
        self._nets, self._params, self._cfg, self._levels = nets, params, cfg, levels
        self._like = params["language"]["norm"]["scale"]

    def read(self, seq: Sequence, stop: int | None = None) -> jax.Array:
        """Read what is not cached, up to index `stop`; return the scores (1, vocab) after it."""
        *_, (_, scores) = self.pieces(seq, stop)
        return scores

    def pieces(self, seq: Sequence, stop: int | None = None) -> Iterator[tuple[int, jax.Array]]:
        """Read as `read` does; yield the number of tokens of each piece, and the scores after it.

        What a sequence says of its position holds before the first piece and after the last.
        """
        stop = len(seq) if stop is None else stop
        ids = np.asarray(seq.ids[seq.cached : stop], np.int32)
        pictures = [(at - seq.cached, p) for at, p in seq.pictures if seq.cached <= at < stop]
        positions, after = self._positions(len(ids), pictures, seq.position)
        features, places = self.look(len(ids), pictures)
        for start in range(0, len(ids), PIECE):
            piece = slice(start, min(start + PIECE, len(ids)))
            new = self._new(ids[piece], positions[piece], places[piece], seq.cached)
            cache = self._room(seq, new.ids.shape[1])
            fresh, seq.cache = seq.cached == 0, None
            own = features if (places[piece] >= 0).any() else None
            scores, seq.cache = text.prefill(
                self._nets, self._params["language"], new, own, cache, fresh=fresh
            )
            seq.cached += piece.stop - piece.start
            if piece.stop == len(ids):
                seq.position = after
            yield piece.stop - piece.start, scores

    def score(self, seq: Sequence, continuation: list[int]) -> np.ndarray:
        """Return the log-probability of each token of a continuation of a sequence.

        All of the sequence but its last token must be cached. It stays as it was: what is written
        behind its cached tokens is not counted as such.
        """
        whole = np.asarray([seq.ids[-1], *continuation], np.int32)
        positions = _along(seq.position, len(whole))
        none = np.full(len(whole), -1, np.int32)
        out = []
        for start in range(0, len(continuation), PIECE):
            piece = slice(start, min(start + PIECE, len(continuation)))
            offset = seq.cached + start
            new = self._new(whole[:-1][piece], positions[:-1][piece], none[:-1][piece], offset)
            targets = np.zeros(new.ids.shape[1], np.int32)
            targets[: piece.stop - piece.start] = continuation[piece]
            cache, seq.cache = self._room(seq, new.ids.shape[1], offset), None
            logprobs, seq.cache = text.score(
                self._nets, self._params["language"], new, targets, cache, fresh=offset == 0
            )
            out.append(np.asarray(logprobs)[: piece.stop - piece.start])
        return np.concatenate(out)

    def look(self, tokens: int, pictures: list[tuple[int, Picture]]) -> tuple[Any, np.ndarray]:
        """Return features of all pictures, and the row of each token's feature or -1.

        Args:
          tokens: how many tokens there are.
          pictures: (index of the first token, picture).
        """
        places = np.full(tokens, -1, np.int32)
        if not pictures:
            return None, places
        sizes = self._cfg.vision
        room = power(max(len(p.patches) for _, p in pictures), _LEAST_PATCHES)
        count = power(len(pictures))
        pixels = np.zeros((count, room, pictures[0][1].patches.shape[1]), np.uint8)
        grids = [(sizes.merge,) * 2] * count  # the smallest stands in where there is none
        for i, (at, picture) in enumerate(pictures):
            pixels[i, : len(picture.patches)], grids[i] = picture.patches, picture.grid
            cells = len(picture.patches) // sizes.cell
            places[at : at + cells] = i * room // sizes.cell + np.arange(cells)
        known = vision.places(grids, sizes, room)
        return text.look(self._nets, self._params["visual"], self._levels, pixels, known), places

    def _positions(
        self, tokens: int, pictures: list[tuple[int, Picture]], start: int
    ) -> tuple[np.ndarray, int]:
        if self._cfg is None:
            return _along(start, tokens), start + tokens
        # by where pictures are, not by token: a model may sample an image token
        marks = np.full(tokens, -1)
        for at, picture in pictures:
            marks[at : at + len(picture.patches) // self._cfg.vision.cell] = self._cfg.image_token
        return position_ids(marks, [p.grid for _, p in pictures], self._cfg, start)

    def _new(self, ids, positions, places, offset: int) -> text.New:
        size = power(len(ids), _LEAST)
        pad = lambda x, fill: np.concatenate(
            [x, np.full((size - len(x), *x.shape[1:]), fill, x.dtype)]
        )[None]
        return text.New(
            ids=pad(ids, 0),
            positions=pad(positions, 0),
            places=pad(places, -1),
            count=np.int32(len(ids)),
            offset=np.full(1, offset, np.int32),
        )

    def _room(self, seq: Sequence, new: int, offset: int | None = None):
        """The sequence's cache with room for `new` more tokens, padding included."""
        places = bucket((seq.cached if offset is None else offset) + new)
        if seq.cache is None:
            return text.empty_cache(self._nets, 1, places, self._like)
        if seq.cache[0].keys.shape[2] >= places:
            return seq.cache
        return text.resize(seq.cache, places)


def _along(start: int, count: int) -> np.ndarray:
    """Positions of text: the same along time, height and width."""
    return np.repeat(np.arange(start, start + count, dtype=np.int32)[:, None], 3, axis=1)


def room(cached: int, stop: int) -> int:
    """Return the cache places that reading takes from one index to another, padding included."""
    last = (stop - cached - 1) // PIECE * PIECE
    return bucket(cached + last + power(stop - cached - last, _LEAST))
