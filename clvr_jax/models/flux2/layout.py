"""What a sequence holds and who sees whom: layouts, attention patterns, rotary tables.

A sequence is [text, noise, reference 0, reference 1, ...]. A pattern is data: for each kind of
token, the kinds it attends to, and which kinds are modulated at t = 0 instead of the current t.
`lower` turns a layout into a static list of (query span, key spans) attention calls, never a mask.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np

from clvr_jax.typing import Array, Float

Size = tuple[int, int]  # rows and columns of an image in tokens
Span = tuple[int, int]  # first token and one past the last


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who attends to whom.

    Attributes:
      text: kinds that text tokens see: text, noise, references, earlier (references up to the
        querying one, itself included).
      noise: the same for the tokens being denoised.
      reference: the same for reference tokens.
      zero: kinds modulated at t = 0.
    """

    text: frozenset[str]
    noise: frozenset[str]
    reference: frozenset[str]
    zero: frozenset[str] = frozenset()

    @property
    def cacheable(self) -> bool:
        """Whether keys and values of references depend on references alone."""
        return self.reference <= {"references", "earlier"} and "reference" in self.zero

    @property
    def appendable(self) -> bool:
        """Whether a new reference leaves the keys and values of earlier ones as they are."""
        return self.cacheable and "references" not in self.reference


_ALL = frozenset({"text", "noise", "references"})

PATTERNS = {
    # what klein was trained with
    "full": Pattern(_ALL, _ALL, _ALL),
    # klein-9b-kv: references see references, at t = 0
    "kv": Pattern(_ALL, _ALL, frozenset({"references"}), zero=frozenset({"reference"})),
    # an experiment of this project: a growing history never changes what came before
    "causal": Pattern(_ALL, _ALL, frozenset({"earlier"}), zero=frozenset({"reference"})),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shape of a sequence; one layout is one compiled program.

    Attributes:
      text: text tokens, padding included (klein sees its padding).
      noise: size of the image being made, in tokens.
      references: sizes of the reference images that are in the sequence.
      cached: sizes of earlier references of which only keys and values are given.
      pattern: a key of `PATTERNS`.
    """

    text: int
    noise: Size
    references: tuple[Size, ...] = ()
    cached: tuple[Size, ...] = ()
    pattern: str = "full"

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(
                f"attention pattern {self.pattern!r} is unknown; choose from {', '.join(PATTERNS)}"
            )
        if self.cached and not self.rule.cacheable:
            raise ValueError(
                f"pattern {self.pattern!r} cannot use cached references: their keys and values "
                "depend on the noise and on t; put them in `references`"
            )
        if self.cached and self.references and not self.rule.appendable:
            raise ValueError(
                f"pattern {self.pattern!r} cannot add references to cached ones: earlier "
                "references see later ones; encode all of them together"
            )

    @property
    def rule(self) -> Pattern:
        """The attention pattern itself."""
        return PATTERNS[self.pattern]

    @property
    def noise_tokens(self) -> int:
        """Number of tokens being denoised."""
        return self.noise[0] * self.noise[1]

    @property
    def image_tokens(self) -> int:
        """Number of image tokens in the sequence: noise, then references."""
        return self.noise_tokens + sum(rows * cols for rows, cols in self.references)

    @property
    def cached_tokens(self) -> int:
        """Number of cached reference tokens."""
        return sum(rows * cols for rows, cols in self.cached)

    def references_only(self) -> "Layout":
        """The layout of encoding this layout's references into a cache.

        Raises:
          ValueError: the pattern does not allow a cache.
        """
        if not self.rule.cacheable:
            raise ValueError(f"pattern {self.pattern!r} has no reference cache; use kv or causal")
        return dataclasses.replace(self, text=0, noise=(0, 0))

    def with_cache(self) -> "Layout":
        """The layout of the denoising steps once this layout's references are cached."""
        return dataclasses.replace(self, references=(), cached=self.cached + self.references)


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call: a span of queries, spans of live keys, and whether the cache is seen."""

    query: Span
    keys: tuple[Span, ...]
    cache: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """A lowered layout.

    Attributes:
      calls: attention calls whose query spans cover the sequence in order.
      zero: (start, stop) of the tokens modulated at t = 0, or None.
    """

    calls: tuple[Call, ...]
    zero: Span | None


@functools.cache
def lower(layout: Layout) -> Plan:
    """Turn a layout into attention calls with as few, as long spans as possible."""
    groups = [("text", layout.text), ("noise", layout.noise_tokens)]
    groups += [("reference", rows * cols) for rows, cols in layout.references]
    stops = list(itertools.accumulate(length for _, length in groups))
    spans = [(stop - length, stop) for stop, (_, length) in zip(stops, groups)]
    merged: list[tuple[Span, tuple[Span, ...], bool]] = []
    for index, ((kind, length), span) in enumerate(zip(groups, spans)):
        if length == 0:
            continue
        seen = getattr(layout.rule, kind)
        keys: tuple[Span, ...] = ()
        for other, ((other_kind, other_length), other_span) in enumerate(zip(groups, spans)):
            visible = other_kind in seen
            if other_kind == "reference":
                visible = "references" in seen or ("earlier" in seen and other <= index)
            if visible and other_length:
                keys = _append(keys, other_span)
        cache = bool(layout.cached) and bool({"references", "earlier"} & seen)
        if merged and merged[-1][1:] == (keys, cache):
            merged[-1] = ((merged[-1][0][0], span[1]), keys, cache)
        else:
            merged.append((span, keys, cache))
    zero = None
    if layout.references and "reference" in layout.rule.zero:
        zero = (spans[2][0], spans[-1][1])
    return Plan(tuple(Call(*item) for item in merged), zero)


def _append(spans: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    if spans and spans[-1][1] == span[0]:
        return (*spans[:-1], (spans[-1][0], span[1]))
    return (*spans, span)


def rotary(
    layout: Layout, axes: tuple[int, ...], theta: float
) -> tuple[Float[Array, "l half"], Float[Array, "l half"]]:
    """Return cos and sin of the rotary angles of a sequence, float32.

    Positions are (T, H, W, L): text token l is (0, 0, 0, l); the image being made is
    (0, row, column, 0); reference i, cached ones counted first, is (10 + 10 i, row, column, 0).
    Tables are made per axis in float64 and broadcast, so that no large constant is compiled in.
    """
    images = [(0, layout.noise)]
    images += [
        (10 + 10 * (len(layout.cached) + i), size) for i, size in enumerate(layout.references)
    ]

    def table(axis: int, positions) -> np.ndarray:
        width = axes[axis]
        angles = np.outer(positions, theta ** (-np.arange(0, width, 2, dtype=np.float64) / width))
        return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)  # 2, position, j

    def text() -> Float[Array, "two l half"]:
        fixed = [jnp.asarray(table(axis, [0])) for axis in range(3)]
        fixed = [jnp.broadcast_to(f, (2, layout.text, f.shape[-1])) for f in fixed]
        return jnp.concatenate([*fixed, table(3, np.arange(layout.text))], axis=-1)

    def image(t: int, size: Size) -> Float[Array, "two l half"]:
        rows, cols = size
        parts = [
            table(0, [t])[:, None],
            table(1, np.arange(rows))[:, :, None],
            table(2, np.arange(cols))[:, None],
            table(3, [0])[:, None],
        ]
        parts = [jnp.broadcast_to(p, (2, rows, cols, p.shape[-1])) for p in parts]
        return jnp.concatenate(parts, axis=-1).reshape(2, rows * cols, sum(axes) // 2)

    cos, sin = jnp.concatenate([text(), *(image(t, size) for t, size in images)], axis=1)
    return cos, sin
