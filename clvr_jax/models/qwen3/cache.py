"""Keys and values of past tokens: an explicit value that programs take and give back."""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import struct

from clvr_jax.kernels.attention import attend
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int


@struct.dataclass
class KV:
    """One layer's keys and values, `m` places a row; which of them are real the caller knows.

    Heads come before places: a decode step reads each head's keys as one contiguous matrix.

    Attributes:
      keys: (b g m k).
      values: (b g m k).
    """

    keys: Any
    values: Any

    def write(
        self,
        keys: Float[Array, "b l g k"],
        values: Float[Array, "b l g k"],
        offset: Int[Array, "b"],
    ) -> "KV":
        """Return the cache with `l` new tokens from place `offset` of each row on.

        The caller keeps offset + l within the places: a start beyond m - l would be moved back.
        """

        def put(old, new):
            new = einops.rearrange(new, "b l g k -> b g l k").astype(old.dtype)
            one = new.shape[2] == 1
            # in a loop on a CPU, XLA copies the whole cache to write a slice
            if len(new) == 1 and not (one and jax.default_backend() == "cpu"):
                return jax.lax.dynamic_update_slice(old, new, (0, 0, offset[0], 0))
            if one:
                # every index said: with a slice over the heads, TPUs would transpose the cache; and
                # none counted from the end, else no partitioner would see that heads are apart
                rows, heads = jnp.arange(old.shape[0])[:, None], jnp.arange(old.shape[1])
                put = old.at[rows, heads, offset[:, None]].set
                return put(new[:, :, 0], mode="drop", wrap_negative_indices=False)
            write = lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (0, start, 0))
            return jax.vmap(write)(old, new, offset)

        return KV(spread(put(self.keys, keys)), spread(put(self.values, values)))


def attend_cached(
    q: Float[Array, "b l h k"],
    cache: KV,
    offset: Int[Array, "b"],
    implementation: str | None = None,
) -> Float[Array, "b l h k"]:
    """Attention of new queries over a cache that holds their own keys already.

    Query i of a row sees places 0 .. offset + i.
    """
    if q.shape[1] > 1:
        keys, values = (
            einops.rearrange(x, "b g m k -> b m g k").astype(q.dtype)
            for x in (cache.keys, cache.values)
        )
        masks = {"causal": True, "offset": offset}
        return attend(q, keys, values, **masks, implementation=implementation)
    # one query a row: two products over the cache as it lies in memory
    wide = jnp.promote_types(q.dtype, jnp.float32)
    queries = einops.rearrange(q, "b 1 (g r) k -> b g r k", g=cache.keys.shape[1])
    scores = jnp.einsum("bgrk,bgmk->bgrm", queries, cache.keys, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    seen = jnp.arange(cache.keys.shape[2]) <= offset[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bgrm,bgmk->bgrk", weights.astype(cache.values.dtype), cache.values)
    return einops.rearrange(out, "b g r k -> b 1 (g r) k").astype(q.dtype)


def spread(x: Array) -> Array:
    """Return keys or values (b g m k) spread over the mesh, if there is one."""
    return constrain(x, "batch", "heads", None, None)


def empty(
    layers: int, rows: int, heads: int, places: int, width: int, dtype: Any
) -> tuple[KV, ...]:
    """Return an empty cache of every layer: `rows` sequences of `places` tokens."""
    make = lambda: jnp.zeros((rows, heads, places, width), dtype)
    return tuple(KV(make(), make()) for _ in range(layers))


def nbytes(cache: tuple[KV, ...] | None) -> int:
    """Return the bytes that a cache occupies; 0 where there is none."""
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def token_bytes(cfg: Qwen3Config, width: int) -> int:
    """Return the bytes of keys and values of one token, `width` bytes a number."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_width * width
