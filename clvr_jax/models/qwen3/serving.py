"""Parameters laid out for decoding: layers apart, kernels that read the same input in one.

A decode step reads every weight once, so it should read long rows where they lie: seven products a
layer become four, and no stacked leaf is sliced. Kernels are matrices: TPUs lay out small axes
between as the shape suggests, not as a product reads them, and would copy them at every call.
Columns come in groups, one for each key head (its queries, key and value; a part of the gate and
the same part of up), so that tensor parallelism, which cuts between groups, never reshards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from clvr_jax.models.layers import unstack
from clvr_jax.models.qwen3.config import STACKED, Qwen3Config
from clvr_jax.typing import Params

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj")


def prepare(params: Params, cfg: Qwen3Config, shardings: Params | None = None) -> Params:
    """Return the parameters of `LanguageModel(cfg, scan=False, fused=True)`; frees the given ones.

    Args:
      params: of a scanned language model, stacked.
      cfg: its sizes.
      shardings: of the result (`abstract` says its shapes); None leaves placement to the compiler.

    Raises:
      ValueError: the key heads do not divide the MLP's width, so that it has no groups.
    """
    params = dict(params)
    layers = dict(params.pop("layers"))
    fuse = jax.jit(functools.partial(_fuse, cfg=cfg))
    apart: Params = {"layers": {}}
    for name in ("self_attn", "mlp"):  # one of them at a time: no second copy of the whole model
        part = layers.pop(name)
        apart["layers"][name] = jax.block_until_ready(fuse(part))
        for joined in part.keys() & {*_ATTENTION, *_MLP}:
            part[joined]["kernel"].delete()
    apart["layers"] |= layers
    result = unstack({**params, **apart}, STACKED)
    return result if shardings is None else jax.device_put(result, shardings, donate=True)


def abstract(params: Params, cfg: Qwen3Config) -> Params:
    """Return the shapes of what `prepare` makes of parameters of these shapes."""

    def shape(params):
        params = dict(params)
        layers = params.pop("layers")
        whole = {name: _fuse(part, cfg=cfg) for name, part in layers.items()}
        split = {
            f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], whole) for i in range(cfg.layers)
        }
        return {**params, **split}

    return jax.eval_shape(shape, params)


def _fuse(part: dict[str, Any], *, cfg: Qwen3Config) -> dict[str, Any]:
    """Join the kernels of one stacked sub-module that read the same input."""
    if cfg.mlp_width % cfg.kv_heads:
        raise ValueError(
            f"the MLP is {cfg.mlp_width} wide, which {cfg.kv_heads} key heads do not divide; the "
            "kernels of such a model cannot be laid out for serving"
        )
    part = dict(part)
    if "q_proj" in part:
        q, k, v = (part.pop(name)["kernel"] for name in _ATTENTION)
        layers, width = q.shape[:2]
        q = q.reshape(layers, width, cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_width)
        whole = jnp.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)
        part["qkv_proj"] = {"kernel": whole.reshape(layers, width, -1)}
    if "gate_proj" in part:
        gate, up = (part.pop(name)["kernel"] for name in _MLP)
        grouped = [x.reshape(*x.shape[:2], cfg.kv_heads, -1) for x in (gate, up)]
        whole = jnp.stack(grouped, axis=3)
        part["gate_up_proj"] = {"kernel": whole.reshape(*gate.shape[:2], -1)}
    return part
