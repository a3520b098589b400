"""The thin factors of an update, joined from the parts of a matrix and cut into them again.

A part's update is `shared @ own.T`, shared (m, r) and own (n, r), where the parts lie side by side
along n. Rows of a fused matrix (q, k, v) share what they read, columns share what they write.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]  # shared (m, r), own (n, r)


def join(parts: Sequence[Factors]) -> Factors:
    """Return the factors of the whole; exact.

    Parts with the same `shared`, bit for bit, keep it and its rank; otherwise ranks add up and
    `own` is block diagonal. A part of rank 0 is an update of zero.
    """
    live = [(shared, own) for shared, own in parts if shared.shape[1]]
    if not live:
        shared, own = zip(*parts)
        return shared[0], np.concatenate(own)
    if all(np.array_equal(shared, live[0][0]) for shared, _ in live):
        shared, (_, own) = live[0][0], live[0]
        empty = lambda n: np.zeros((n, shared.shape[1]), own.dtype)
        return shared, np.concatenate([y if y.shape[1] else empty(len(y)) for _, y in parts])
    own = np.zeros((sum(len(y) for _, y in parts), sum(y.shape[1] for _, y in parts)), np.float32)
    row = column = 0
    for _, y in parts:
        own[row : row + y.shape[0], column : column + y.shape[1]] = y
        row, column = row + y.shape[0], column + y.shape[1]
    return np.concatenate([shared for shared, _ in parts], axis=1), own


def cut(shared: np.ndarray, own: np.ndarray, sizes: Sequence[int]) -> list[Factors]:
    """Return the factors of parts with `sizes` rows of `own`; the inverse of `join`, exact.

    Where `own` is block diagonal each part gets its own ranks (none, if it has none), otherwise
    every part gets all of `shared`.
    """
    parts = np.split(own, np.cumsum(sizes)[:-1])
    edges = _blocks(np.stack([(part != 0).any(axis=0) for part in parts]))
    if edges is None:
        return [(shared, part) for part in parts]
    spans = [slice(*pair) for pair in pairwise(edges)]
    return [(shared[:, span], part[:, span]) for span, part in zip(spans, parts)]


def _blocks(used: np.ndarray) -> list[int] | None:
    """Edges between the ranks of consecutive parts, or None where parts use ranks in common.

    `used` (part, r) says where a part's columns are not zero. Equal blocks are tried first, because
    a rank that nobody uses says nothing about whose it is.
    """
    count, rank = used.shape
    if not used.any():
        return None
    edges = [rank * part // count for part in range(count + 1)]
    if rank % count or not _fits(used, edges):
        edges = [0]
        for columns in used[:-1]:
            edges.append(max([edges[-1], *(np.flatnonzero(columns) + 1)]))
        edges.append(rank)
    return edges if _fits(used, edges) else None


def _fits(used: np.ndarray, edges: list[int]) -> bool:
    inside = np.zeros_like(used)
    for part, (start, stop) in enumerate(pairwise(edges)):
        inside[part, start:stop] = True
    return not (used & ~inside).any()
