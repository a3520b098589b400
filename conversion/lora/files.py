"""LoRA files of every dialect to adapter trees, and adapter trees to files that others load.

Adapters are of klein's transformer unless other rule tables are given.

Module names, shapes, fusions and swapped halves are those of the weights' own rule tables. A module
that a file stores fused is cut into our parts, and parts that a file stores apart are joined, as
`factors` does it: exactly, whatever the ranks.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from clvr_jax import lora
from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Params
from clvr_jax.weights import SafetensorsReader, WeightsError, write_safetensors
from conversion.flux2 import BFL, DIFFUSERS
from conversion.lora import dialects
from conversion.lora.dialects import ADAPTER_CONFIG, ADAPTER_MODEL
from conversion.lora.factors import Factors, cut, join
from conversion.rules import Bound, Entry, Table, Target

KLEIN = (DIFFUSERS, BFL)
_WRITTEN = {"peft": (DIFFUSERS, "transformer."), "bfl": (BFL, "diffusion_model.")}


def read(path: str | Path, abstract: Params, tables: Sequence[Table] = KLEIN) -> Params:
    """Read a LoRA file of any dialect as float32 adapters.

    alpha / rank is folded into `b`. Layers of a stacked kernel that the file does not adapt are
    zero, and smaller ranks are padded with zeros.

    Args:
      path: a safetensors file, or a folder that holds one.
      abstract: the model's parameters, or their shapes.
      tables: its rule tables, a name of each module in each.

    Raises:
      WeightsError: a tensor is not a LoRA factor of this model's linear layers, lacks its other
        half, has the wrong shape or values that are not finite, or two tensors adapt one kernel.
    """
    file = _the_file(Path(path))
    entries = [entry for table in tables for entry in _linear(table, abstract)]
    shapes = {_module(s): entry.source_shape for entry in entries for s in entry.sources}
    with SafetensorsReader(file) as reader:
        keys = dialects.parse(reader.tensors, shapes, str(file))
        config = _config(reader.metadata, file)
        found = {m: _factors(reader, keys[m], m, shapes[m], config) for m in keys}
    layers: dict[str, dict[int | None, Factors]] = {}
    for entry in entries:
        modules = [_module(source) for source in entry.sources]
        if found.keys().isdisjoint(modules):
            continue
        parts = [found.get(module, _nothing(shapes[module])) for module in modules]
        sizes = [target.stop - target.start for target in entry.targets]
        for target, (a, b) in zip(entry.targets, _regroup(entry, parts, sizes)):
            name, b = lora.parent(target.path), _swapped(entry, target, target.from_file(b))
            if target.layer in layers.setdefault(name, {}):
                where = name if target.layer is None else f"{name}, layer {target.layer}"
                twice = "two adapters, in BFL's and diffusers' names"
                raise WeightsError(file, where, twice, "one")
            layers[name][target.layer] = a, b
    return _stacked(layers, abstract)


def write(
    path: str | Path,
    adapters: Params,
    abstract: Params,
    dialect: str = "peft",
    dtype: Any = np.float32,
) -> None:
    """Write adapters as a LoRA file whose alpha is its rank.

    Args:
      path: the file to write, ending in `.safetensors`.
      adapters: adapters of the transformer.
      abstract: the transformer's parameters, or their shapes.
      dialect: "peft" for diffusers' `load_lora_weights`, "bfl" for tools that keep BFL's names.
      dtype: of the tensors.

    Raises:
      ValueError: adapters do not fit the parameters, are zero everywhere or beyond the type, or
        the dialect or the file's ending is unknown.
    """
    if dialect not in _WRITTEN:
        raise ValueError(f"unknown LoRA dialect {dialect!r}; expected one of {', '.join(_WRITTEN)}")
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a LoRA is written as one file; name it .safetensors: {path}")
    table, prefix = _WRITTEN[dialect]
    tensors, ranks = _tensors(adapters, abstract, table, prefix, dtype, str(path))
    config = {f"transformer.{key}": value for key, value in _lora_config(ranks).items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    _write(Path(path), tensors, {dialects.METADATA: text} if dialect == "peft" else None)


def write_folder(
    folder: Path,
    adapters: Params,
    abstract: Params,
    table: Table,
    base: str,
    dtype: Any = np.float32,
) -> None:
    """Write adapters as PEFT's own folder, which PEFT loads and `--weights` takes.

    Args:
      folder: is there, and empty.
      adapters: of the model.
      abstract: its parameters, or their shapes.
      table: its rule table in the layout of diffusers or transformers.
      base: folder or hub id of the model, for those who load the adapters.
      dtype: of the tensors.

    Raises:
      ValueError: adapters do not fit the parameters, are zero everywhere or beyond the type.
    """
    prefix = "base_model.model."
    tensors, ranks = _tensors(adapters, abstract, table, prefix, dtype, str(folder))
    _write(folder / ADAPTER_MODEL, tensors, {"format": "pt"})
    config = {"base_model_name_or_path": base, "bias": "none", **_lora_config(ranks)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text)


def _tensors(
    adapters: Params, abstract: Params, table: Table, prefix: str, dtype: Any, what: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors of a file by name, and the rank of each module."""
    kernels, pairs = flatten(abstract), lora.pairs(adapters)
    for name, (a, b) in pairs.items():
        if f"{name}/kernel" not in kernels:
            raise ValueError(f"adapter {name} has no kernel {name}/kernel in this model")
        lora.check(name, kernels[f"{name}/kernel"].shape, a.shape, b.shape)
    tensors, ranks, entries = {}, {}, _linear(table, abstract)
    written = {lora.parent(target.path) for entry in entries for target in entry.targets}
    lost = [name for name in pairs.keys() - written if any(map(np.any, pairs[name]))]
    if lost:
        raise ValueError(f"{what}: no LoRA file has adapters of {', '.join(sorted(lost))}")
    for entry in entries:
        parts = []
        for target in entry.targets:
            a, b = _layer(pairs.get(lora.parent(target.path)), target)
            parts.append((a, target.to_file(_swapped(entry, target, b))))
        sizes = [entry.source_shape[entry.axis]] * len(entry.sources)
        for source, (a, b) in zip(entry.sources, _regroup(entry, parts, sizes)):
            if not a.shape[1]:
                continue
            ranks[_module(source)] = a.shape[1]
            tensors[f"{prefix}{_module(source)}.lora_A.weight"] = a.T
            tensors[f"{prefix}{_module(source)}.lora_B.weight"] = b
    if not tensors:
        raise ValueError(f"{what}: the adapters are zero everywhere; there is nothing to write")
    with np.errstate(over="ignore"):  # what overflows is refused below, by name
        tensors = {key: np.ascontiguousarray(value, dtype) for key, value in tensors.items()}
    for key, tensor in tensors.items():
        _check_finite(key, tensor, what)
    return tensors, ranks


def _write(file: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None) -> None:
    specs = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    write_safetensors(file, specs, tensors.items(), metadata=metadata)


def _the_file(path: Path) -> Path:
    """The safetensors file at `path`, or the only one inside it."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise WeightsError(path, None, f"safetensors files: {names}", "one, with LoRA factors")
    return files[0]


def _config(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """PEFT's LoraConfig: in the header as diffusers keeps it, or beside the file as PEFT does."""
    beside = file.with_name(ADAPTER_CONFIG)
    if file.name == ADAPTER_MODEL and beside.exists():
        return dialects.parse_config(beside.read_text(), str(beside))
    config = dialects.parse_config(metadata.get(dialects.METADATA, "{}"), str(file))
    prefix = "transformer."
    return {key.removeprefix(prefix): v for key, v in config.items() if key.startswith(prefix)}


def _linear(table: Table, abstract: Params) -> list[Entry]:
    """The entries of a table whose targets are kernels of linear layers, not of convolutions."""
    is_kernel = lambda entry: all(t.path.endswith("/kernel") for t in entry.targets)
    entries = filter(is_kernel, Bound(table, abstract).entries)
    return [entry for entry in entries if len(entry.source_shape) == 2]


def _module(source: str) -> str:
    return source.removesuffix(".weight")


def _swapped(entry: Entry, target: Target, b: np.ndarray) -> np.ndarray:
    """Reverse the axis that the file has in the other order; `b` has the kernel's output axes."""
    return np.flip(b, target.pattern.leaf.index(entry.swap)) if entry.swap else b


def _regroup(entry: Entry, parts: Sequence[Factors], sizes: Sequence[int]) -> list[Factors]:
    """Join factors (a (i, r), b (o, r)) along an entry's axis and cut them to other sizes.

    Parts that are rows of the file's matrix read the same inputs; columns write the same outputs.
    """
    order = 1 if entry.axis == 0 else -1
    joined = join([part[::order] for part in parts])
    return [part[::order] for part in cut(*joined, sizes)]


def _factors(
    reader: SafetensorsReader,
    keys: Mapping[str, str],
    module: str,
    shape: tuple[int, int],
    config: Mapping[str, Any],
) -> Factors:
    """Factors (i, r) and (o, r) of a module in float32, the scale folded into the latter."""
    file = str(reader.path)
    values = {}
    for side, key in keys.items():
        array = np.asarray(reader.read(key))
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise WeightsError(file, key, f"{array.dtype}", "floating point numbers")
        values[side] = array.astype(np.float32)
        _check_finite(key, values[side], file)
    a, b, alpha = values["a"], values["b"], values.get("alpha")
    rank = a.shape[0] if a.ndim else 0
    for side, expected in (("a", (rank, shape[1])), ("b", (shape[0], rank))):
        if values[side].shape != expected or not rank:
            fitting = f"{expected} to adapt {module}, a weight {shape}, with rank {rank}"
            raise WeightsError(file, keys[side], f"shape {values[side].shape}", fitting)
    if alpha is not None and alpha.size != 1:
        raise WeightsError(file, keys["alpha"], f"shape {alpha.shape}", "one number")
    alpha = None if alpha is None else float(alpha.reshape(()))
    return a.T, b * np.float32(dialects.scale(config, module, rank, alpha, file))


def _nothing(shape: tuple[int, int]) -> Factors:
    """Factors of rank 0 for a weight (o, i)."""
    return np.zeros((shape[1], 0), np.float32), np.zeros((shape[0], 0), np.float32)


def _check_finite(key: str, values: np.ndarray, file: str) -> None:
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise WeightsError(file, key, f"{bad} of {values.size} values not finite", "all finite")


def _stacked(layers: Mapping[str, Mapping[int | None, Factors]], abstract: Params) -> Params:
    """Adapters in the order of the kernels; layers stacked, ranks padded with zeros."""
    flat = {}
    for path, kernel in flatten(abstract).items():
        name = lora.parent(path)
        if not path.endswith("/kernel") or name not in layers:
            continue
        given = layers[name]
        rank = max(a.shape[1] for a, _ in given.values())
        if not rank:
            continue
        if None in given:
            a, b = (np.ascontiguousarray(factor, np.float32) for factor in given[None])
        else:
            count, width, *out = kernel.shape
            a = np.zeros((count, width, rank), np.float32)
            b = np.zeros((count, rank, *out), np.float32)
            for layer, (one_a, one_b) in given.items():
                a[layer, :, : one_a.shape[1]] = one_a
                b[layer, : one_b.shape[0]] = one_b
        flat[f"{name}/a"], flat[f"{name}/b"] = a, b
    return unflatten(flat)


def _layer(pair: tuple[Any, Any] | None, target: Target) -> Factors:
    """One layer of an adapter in float32 without the ranks that are padding: zero in a and in b."""
    width, *out = target.shape
    if pair is None:
        return np.zeros((width, 0), np.float32), np.zeros((0, *out), np.float32)
    a, b = (leaf if target.layer is None else leaf[target.layer] for leaf in pair)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    kept = (a != 0).any(axis=0) | (b != 0).any(axis=tuple(range(1, b.ndim)))
    return a[:, kept], b[kept]


def _lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What matters of PEFT's LoraConfig: the most common rank, and the others by name."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "lora_bias": False,
        "use_dora": False,
    }
