"""Formulas of what a step holds besides arrays of known shape: an estimate, and said to be one.

Bytes per token and layer were counted from what JAX's own trace of a layer keeps for its backward
pass (the leaves of `jax.vjp`'s second result, as tests/launch/test_plan.py does again), by size:
d model width, h heads times head width (queries), g the same of keys and values, m MLP width. Under
"none" a layer keeps what it does in float32 (norms, rotation, attention's keys) in float32.
How far XLA is off. CPU, toy and mid-size models in float32: temporaries grow with depth and with
length as these say, within 5 % ("none", "full", "attention"); a layer at work takes 1.6 to 3.2
times what is written here. TPU, by XLA's buffer assignment of the whole steps in bfloat16 under
"full" (exact part included): Qwen3-VL 8B 15.0 GiB of 15.3 planned for v5e-64, 17.8 of 17.9 for
v6e-32, 10.5 of 12.7 for v5e-64 with context 2; klein 4B 4.2 of 6.9 and 9B 7.3 of 11.3 for v5e-64.
GPUs: not compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence

# per token: how many numbers in float32, and how many in the compute type
_WIDE, _NARROW = 0, 1
Sizes = Mapping[str, tuple[float, float]]

# what one layer keeps under each policy: size -> (float32, compute type)
KLEIN_SINGLE: Mapping[str, Sizes] = {
    "none": {"d": (3, 3), "h": (4, 2), "m": (0, 6), "attention": (2, 1)},
    "full": {"d": (0, 1)},
    "attention": {"d": (0, 1), "h": (0, 1)},
    "dots": {"d": (0, 3), "h": (0, 3), "m": (0, 2)},
}
KLEIN_DOUBLE: Mapping[str, Sizes] = {
    **KLEIN_SINGLE,
    "none": {"d": (6, 5), "h": (4, 2), "m": (0, 6), "attention": (2, 1)},
}
LANGUAGE: Mapping[str, Sizes] = {
    "none": {"d": (4, 4), "h": (2, 3), "g": (4, 1), "m": (0, 6)},
    "full": {"d": (0, 1)},
    "attention": {"d": (0, 1), "h": (0, 1)},
    "dots": {"d": (0, 2), "h": (0, 1), "g": (0, 2), "m": (0, 2)},
}
VISION: Mapping[str, Sizes] = {
    "none": {"d": (6.75, 3), "h": (2, 1), "m": (0, 6)},  # .75: a byte for each DeepStack feature
    "full": {"d": (0, 1)},
    "attention": {"d": (0, 1), "h": (0, 1)},
    "dots": {"d": (1, 1), "h": (3, 0), "m": (1, 0)},
}
AT_WORK = 1  # a layer computed again and differentiated, in layers kept under "none"


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes of one device, and how they were found.

    Attributes:
      label: what it is.
      size: bytes.
      how: the formula in words, or "exact".
      kept: held through the whole backward pass; else only while its part is at work.
    """

    label: str
    size: int
    how: str
    kept: bool = True


@dataclasses.dataclass(frozen=True)
class Ways:
    """Over how many devices activations are spread.

    Attributes:
      rows: devices that the rows of a batch are spread over.
      tensor: devices that heads, MLP and vocabulary are spread over.
      context: devices that the tokens of a row are spread over.
      shards: devices that store a parameter together, besides `tensor`.
    """

    rows: int = 1
    tensor: int = 1
    context: int = 1
    shards: int = 1

    @classmethod
    def of(cls, mesh: Mapping[str, int]) -> "Ways":
        """Return those of a mesh's sizes."""
        fsdp, context = mesh.get("fsdp", 1), mesh.get("context", 1)
        return cls(mesh.get("data", 1) * fsdp, mesh.get("tensor", 1), context, fsdp * context)


def per_token(sizes: Sizes, widths: Mapping[str, int], ways: Ways, itemsize: int) -> float:
    """Return the bytes that a layer keeps of one token; widths but d are split over `tensor`."""
    total = 0.0
    for name, counts in sizes.items():
        width = widths["h" if name == "attention" else name]
        split = 1 if name == "d" else ways.tensor
        total += width * (4 * counts[_WIDE] + itemsize * counts[_NARROW]) / split
    return total


def layers(
    label: str,
    count: int,
    tokens: float,
    table: Mapping[str, Sizes],
    remat: str,
    widths: Mapping[str, int],
    ways: Ways,
    itemsize: int,
) -> list[Line]:
    """Return what a stack of layers keeps, and one of them at work.

    Args:
      label: of the stack.
      count: layers.
      tokens: of one device: its rows times their tokens, its share of the context.
      table: a table above.
      remat: a policy.
      widths: of the letters in the table.
      ways: of the mesh.
      itemsize: bytes of the compute type.
    """
    kept = per_token(table[remat], widths, ways, itemsize)
    work = AT_WORK * per_token(table["none"], widths, ways, itemsize)
    each = f"{tokens:,.0f} tokens x {kept / 1e3:.1f} kB"
    lines = [Line(f"{label}: kept, remat {remat}", int(count * tokens * kept), f"{count} x {each}")]
    how = f"{AT_WORK} x what a layer keeps without remat, {tokens:,.0f} x {work / 1e3:.1f} kB"
    return [*lines, Line(f"{label}: a layer at work", int(tokens * work), how, kept=False)]


def gathered(layer: int, shards: int, trained: bool) -> list[Line]:
    """Return the weights that lie whole on a device while they are used.

    Args:
      layer: bytes of the largest layer in the compute type, as tensor parallelism leaves it.
      shards: devices that store a parameter together, besides `tensor`.
      trained: whether its gradient is there as well before it is spread.
    """
    if shards == 1:
        return []
    count = 3 if trained else 2
    what = "two layers in flight and the gradient of one" if trained else "two layers in flight"
    return [Line("weights gathered", count * layer, what, kept=False)]


def peak(lines: Sequence[Line]) -> int:
    """Return the bytes at the worst moment: all that is kept, weights, and the largest at work."""
    kept = sum(line.size for line in lines if line.kept)
    weights = sum(line.size for line in lines if line.label == "weights gathered")
    work = [line.size for line in lines if not line.kept and line.label != "weights gathered"]
    return kept + weights + max(work, default=0)
