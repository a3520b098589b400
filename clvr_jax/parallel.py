"""Device mesh, sharding rules and activation constraints; the only file that names mesh axes.

A rule table maps parameter paths to specs. First match wins; a spec has the leaf's rank, or is
`P()` for any rank; an unmatched path is an error; a dimension that its axes do not divide is
replicated and reported. Devices along `context` share the tokens of a sequence and, like those
along `fsdp`, the parameters: what a rule spreads over `fsdp` is spread over both.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Params

AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, P], ...] = (
    # FLUX.2 transformer: layer, d, part, heads or f
    (r"blocks/.*qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*mlp_in/kernel$", P(None, "fsdp", None, "tensor")),
    (r"blocks/.*(attn_out|mlp_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"(modulation\w*/lin|adaLN_modulation)/kernel$", P("fsdp", None, None)),
    (r"(img_in|txt_in|time_in/\w+|final_layer/linear)/kernel$", P("fsdp", None)),
    # Qwen3: layer, d, heads, k
    (r"layers/self_attn/[qkv]_proj/kernel$", P(None, "fsdp", "tensor", None)),
    (r"layers/mlp/(gate|up)_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/(self_attn/o_proj|mlp/down_proj)/kernel$", P(None, "tensor", "fsdp")),
    (r"embed_tokens/embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    # Qwen3 prepared for serving, one layer a leaf: d, columns in groups
    (r"layers_\d+/(self_attn/qkv|mlp/gate_up)_proj/kernel$", P("fsdp", "tensor")),
    (r"layers_\d+/(self_attn/o_proj|mlp/down_proj)/kernel$", P("tensor", "fsdp")),
    # Qwen3-VL's vision tower: layer, d, part, heads, k; mergers: d, cell width
    (r"visual/blocks/attn/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"visual/blocks/attn/qkv/bias$", P(None, None, "tensor", None)),
    (r"visual/blocks/mlp/linear_fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"visual/blocks/(attn/proj|mlp/linear_fc2)/kernel$", P(None, "tensor", "fsdp")),
    (r"visual/deepstack_merger_list/linear_fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"visual/deepstack_merger_list/linear_fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"visual/merger/linear_fc1/kernel$", P("fsdp", "tensor")),
    (r"visual/merger/linear_fc2/kernel$", P("tensor", "fsdp")),
    (r"visual/patch_embed/kernel$", P(None, None, None, None, "fsdp")),
    (r"visual/pos_embed/embedding$", P(None, "fsdp")),
    # the VAE is small, norms are smaller
    (r"^(encoder|decoder|quant_conv|post_quant_conv|bn)/", P()),
    (r"/(scale|bias)$", P()),
    (r"visual/patch_embed/[ab]$", P()),
    # adapters: a is (layer, i, r), b is (layer, r, *out), without the layer outside of stacks
    (r"(blocks|layers|deepstack_merger_list)/.*/a$", P(None, "fsdp", None)),
    (r"/a$", P("fsdp", None)),
    (r"blocks/.*qkv/b$", P(None, None, None, None, "fsdp")),
    (r"(blocks/.*mlp_in|layers/self_attn/[qkv]_proj)/b$", P(None, None, None, "fsdp")),
    (r"(blocks|layers|deepstack_merger_list)/.*/b$", P(None, None, "fsdp")),
    (r"(modulation\w*/lin|adaLN_modulation)/b$", P(None, None, "fsdp")),
    (r"/b$", P(None, "fsdp")),
)

# what the dimensions of activations are spread over
_ACTIVATIONS = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over `AXES`; absent axes have size 1, one axis may be -1 (what is left).

    Raises:
      ValueError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; the axes are {AXES}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(shape) != len(devices):
        given = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
        raise ValueError(
            f"mesh {given} needs {math.prod(shape)} devices, {len(devices)} are present; "
            "change the sizes so that they multiply to the number of devices, or use -1 for one"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fit(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> tuple[P, list[str]]:
    """Return `spec` without the axes that do not divide `shape`, and a line for each such case."""
    fitted, notes = [], []
    ways = lambda names: math.prod(mesh.shape[name] for name in names)
    said = lambda names: f"{'*'.join(names)}={ways(names)}"
    for size, given in zip(shape, spec):
        given = (given,) if isinstance(given, str) else (given or ())
        names = given
        if "fsdp" in given and mesh.shape.get("context", 1) > 1:
            names = (*given, "context")
            if size % ways(names) and size % ways(given) == 0:
                notes.append(f"dimension {size} is not divided by {said(names)}: {said(given)}")
                names = given
        if size % ways(names):
            notes.append(f"dimension {size} is not divided by {said(names)}: replicated")
            names = ()
        fitted.append(tuple(names) if len(names) > 1 else (names[0] if names else None))
    return P(*fitted), notes


def specs(
    abstract: Params, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, P]] = RULES
) -> tuple[dict[str, P], dict[str, list[str]]]:
    """Return the spec of every leaf by path, and the notes of those that fell back.

    Raises:
      ValueError: no rule matches a path, or a spec has another rank than its leaf.
    """
    chosen, notes = {}, {}
    for path, leaf in flatten(abstract).items():
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
        if spec is None:
            raise ValueError(f"no sharding rule matches {path} {tuple(leaf.shape)}; add one")
        if len(spec) not in (0, len(leaf.shape)):
            raise ValueError(
                f"the sharding rule of {path} has rank {len(spec)}, the array {tuple(leaf.shape)}"
            )
        chosen[path], lines = fit(spec, leaf.shape, mesh)
        if lines:
            notes[path] = lines
    return chosen, notes


def shardings(abstract: Params, mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES) -> Params:
    """Return the nested dict of shardings of a tree; prints what falls back to replicated.

    Raises:
      ValueError: see `specs`.
    """
    chosen, notes = specs(abstract, mesh, rules)
    for path, lines in notes.items():
        logging.warning("%s: %s", path, "; ".join(lines))
    return unflatten({path: NamedSharding(mesh, spec) for path, spec in chosen.items()})


def spec(shape: Sequence[int], *names: str | None) -> P | None:
    """Return how an activation lies on the mesh of `jax.set_mesh`, or None outside one.

    Args:
      shape: its sizes.
      names: of its dimensions: batch, tokens, heads, mlp, vocab or None. Axes that do not divide a
        dimension are left out, so a batch of one runs on any mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    chosen = []
    for size, name in zip(shape, names, strict=True):
        axes: tuple[str, ...] = ()
        for axis in _ACTIVATIONS.get(name, ()):
            ways = math.prod(mesh.shape.get(a, 1) for a in (*axes, axis))
            if mesh.shape.get(axis, 1) > 1 and size % ways == 0:
                axes += (axis,)
        chosen.append(axes or None)
    return P(*chosen)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation's dimensions, named as for `spec`; outside a mesh return `x`."""
    placed = spec(x.shape, *names)
    return x if placed is None else jax.lax.with_sharding_constraint(x, placed)


def row_devices(mesh: Mesh | None) -> int:
    """Return over how many devices the rows of a batch are spread."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in _ACTIVATIONS["batch"])


def row_share(mesh: Mesh | None, rows: int) -> tuple[int, int]:
    """Return which rows of a batch this process reads, as (number, of how many equal parts).

    Processes whose devices hold the same rows read the same part.

    Raises:
      ValueError: this process's devices hold rows that are no such part.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    places = NamedSharding(mesh, P(_ACTIVATIONS["batch"])).addressable_devices_indices_map((rows,))
    own = sorted({index[0].indices(rows)[:2] for index in places.values()})
    start, stop = own[0][0], own[-1][1]
    count = rows // (stop - start)
    if (
        sum(b - a for a, b in own) != stop - start
        or rows % (stop - start)
        or start % (stop - start)
    ):
        raise ValueError(
            f"a process's devices hold the rows {own} of {rows}; order the mesh so that they hold "
            "neighbouring ones, e.g. with tensor and context within a host"
        )
    return start // (stop - start), count


def from_rows(local: Any, mesh: Mesh, rows: int) -> jax.Array:
    """Return the array (accumulation, rows, ...) of which this process holds `local`, its rows."""
    shape = (local.shape[0], rows, *local.shape[2:])
    return jax.make_array_from_process_local_data(row_sharding(mesh), local, shape)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return how arrays (accumulation, rows, ...) lie on the devices."""
    return NamedSharding(mesh, P(None, _ACTIVATIONS["batch"]))
