"""Our random weights in a torch module, on the device, by the converter's own rule tables."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from clvr_jax.tree import flatten
from conversion.components import KINDS
from conversion.rules import Bound
from launch.bench.weights import layer_reader


def construct(make, cfg, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Return `make(cfg)` with weights on a device in a type, for inference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never in float32 first: 9B would take twice the memory
    try:
        with device:
            return make(cfg).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def carry(name: str, cfg: Any, params: Any, module: torch.nn.Module) -> None:
    """Write our weights into a torch module by the converter's tables, on the device."""
    kind = KINDS[name]
    abstract, read = layer_reader(params, kind.stacked)
    table = kind.table(cfg, "diffusers")
    ours = flatten(abstract)  # of the text encoder: no head, and only the layers that we run
    kept = [rule for rule in table.rules if all(path in ours for path, _ in rule.targets)]
    table = dataclasses.replace(table, rules=tuple(kept))
    theirs = module.state_dict()
    for file_name, tensor in _tensors(table, abstract, lambda *at: torch.from_dlpack(read(*at))):
        target = theirs[file_name]
        if (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name}: {file_name} is {target.dtype} {tuple(target.shape)} in the reference, "
                f"ours gives {tensor.dtype} {tuple(tensor.shape)}"
            )
        target.copy_(tensor)


def _tensors(table, abstract, read) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file layout whose leaves are there (the rest is not used)."""
    import einops

    for entry in Bound(table, abstract).entries:
        parts = []
        for target in entry.targets:
            leaf = read(target.path, target.layer)
            if entry.swap:
                leaf = torch.flip(leaf, (target.pattern.leaf.index(entry.swap),))
            parts.append(einops.rearrange(leaf, target.pattern.inverse))
        whole = torch.cat(parts, dim=entry.axis)
        yield from zip(entry.sources, torch.chunk(whole, len(entry.sources), dim=entry.axis))
