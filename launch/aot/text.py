"""A vision-language model that answers: look, prefill, continue, decode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clvr_jax.backends.local.reader import PIECE
from clvr_jax.generate import text
from clvr_jax.generate.sampling import Sampling
from clvr_jax.models.qwen3 import cache, serving
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.models.qwen3_vl.config import VARIANTS, Qwen3VLConfig
from launch import build_vlm
from launch.aot import placed, whole

_STOPS = 4


def programs(
    model: str, mesh: Mesh, size: tuple[int, int], batch: int, places: int
) -> dict[str, Callable[[], Any]]:
    """Return calls that lower each program, in bfloat16.

    Both `prefill` (of an empty cache) and `continue` (behind what is cached) read a piece with a
    picture in it.

    Args:
      model: a key of `VARIANTS`.
      mesh: of devices that need not exist.
      size: height and width of the picture.
      batch: conversations that are decoded together.
      places: tokens that the cache of each has room for.
    """
    cfg = VARIANTS[model]
    nets = build_vlm.networks(cfg)
    stacked = build_vlm.abstract(cfg, jnp.bfloat16)
    visual = placed({"visual": stacked["visual"]}, mesh)["visual"]
    params = placed(serving.abstract(stacked["language"], cfg.text), mesh)
    pixels, known = _picture(cfg, size)
    levels = jax.ShapeDtypeStruct((cfg.vision.in_channels, 256), jnp.float32)
    look = lambda: text.look.lower(nets, visual, *whole((levels, pixels, known), mesh))

    def prefill(fresh: bool):
        seen = jax.eval_shape(text.look, nets, visual, levels, pixels, known)
        given = whole((_piece(), seen), mesh)
        return text.prefill.lower(
            nets, params, *given, rows(cfg.text, 1, places).cache, fresh=fresh
        )

    def decode():
        steps, keep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((batch,), bool)
        return text.decode.lower(
            nets, params, rows(cfg.text, batch, places), *whole((steps, keep), mesh)
        )

    return {
        "look": look,
        "prefill": lambda: prefill(fresh=True),
        "continue": lambda: prefill(fresh=False),
        "decode": decode,
    }


def rows(c: Qwen3Config, b: int, places: int, dtype: Any = jnp.bfloat16) -> text.Rows:
    """Return a batch as shapes, placed as decoding leaves it."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((b, *shape), dtype)
    options = dict.fromkeys(Sampling.__dataclass_fields__, array(jnp.float32))
    made = lambda: cache.empty(c.layers, b, c.kv_heads, places, c.head_width, dtype)
    batch = text.Rows(
        cache=jax.eval_shape(made),
        lengths=array(jnp.int32),
        position=array(jnp.int32),
        scores=array(jnp.float32, c.vocab),
        seen=array(bool, c.vocab),
        counts=array(jnp.int32, c.vocab),
        step=array(jnp.int32),
        limit=array(jnp.int32),
        stops=array(jnp.int32, _STOPS),
        active=array(bool),
        sampling=Sampling(**{**options, "top_k": array(jnp.int32), "seed": array(jnp.uint32)}),
    )
    # the program says where it leaves them; compiling it asks no device for memory
    where = text.settle.lower(batch).compile().output_shardings
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, batch, where)


def _picture(cfg: Qwen3VLConfig, size: tuple[int, int]) -> tuple[Any, vision.Places]:
    """Patches of one picture, and what depends on its size."""
    grid = size[0] // cfg.vision.patch, size[1] // cfg.vision.patch
    width = cfg.vision.patch_width // cfg.vision.temporal_patch
    patches = jax.ShapeDtypeStruct((1, grid[0] * grid[1], width), jnp.uint8)
    return patches, vision.places([grid], cfg.vision)


def _piece() -> text.New:
    """As many new tokens of a conversation as one program reads."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return text.New(
        ids=array(1, PIECE),
        positions=array(1, PIECE, 3),
        places=array(1, PIECE),
        count=array(),
        offset=array(1),
    )
