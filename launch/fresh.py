"""Networks before their training: parameters drawn at random, as training wants them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from clvr_jax.tree import flatten, stacked_root, unflatten
from conversion.components import KINDS, Component

# what makes the transformer's blocks the identity, and its first answers zero
# (Peebles and Xie 2022, arXiv 2212.09748: adaLN-Zero)
_ZERO = re.compile(r"modulation\w*/lin/kernel$|adaLN_modulation/kernel$|final_layer/linear/kernel$")


def weights(configs: Mapping[str, Any], seed: int) -> dict[str, tuple[Any, Any]]:
    """Return (config, parameter tree of float32 numpy arrays) of components.

    Args:
      configs: sizes by name of component.
      seed: of all draws.

    Raises:
      ValueError: a component is unknown.
    """
    unknown = set(configs) - set(KINDS)
    if unknown:
        raise ValueError(f"no components {sorted(unknown)}; there are {', '.join(KINDS)}")
    made = {}
    for stream, name in enumerate(KINDS):
        if name not in configs:
            continue
        rng = np.random.Generator(np.random.PCG64([seed, stream]))
        shapes = Component(name, "diffusers", "", configs[name]).abstract()
        stacked = KINDS[name].stacked
        flat = {
            path: _draw(rng, path, leaf.shape, stacked_root(path, stacked) is not None)
            for path, leaf in flatten(shapes).items()
        }
        made[name] = configs[name], unflatten(flat)
    return made


def fan_in(path: str, shape: tuple[int, ...]) -> int:
    """Return how many inputs a product or convolution adds up, from a kernel without layers."""
    convolution = "patch_embed" in path or (len(shape) == 4 and "blocks" not in path)
    return int(np.prod(shape[:-1])) if convolution else shape[0]


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...], layered: bool) -> Any:
    """A leaf: scales 1, biases and what `_ZERO` names 0, kernels so that variance is kept."""
    own = shape[1:] if layered else shape
    if path.endswith(("scale", "var")):
        return np.ones(shape, np.float32)
    if len(own) < 2 or path.endswith("bias") or _ZERO.search(path):
        return np.zeros(shape, np.float32)
    inputs = shape[-1] if path.endswith("embedding") else fan_in(path, own)
    return (rng.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)
