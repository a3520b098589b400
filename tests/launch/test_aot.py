"""Compiling for TPU slices that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from clvr_jax import parallel
from clvr_jax.kernels import splash
from launch import aot

TEXT = """
  %a = bf16[8]{0} all-reduce(%x), channel_id=1, replica_groups={}
  ROOT %b = (bf16[8], bf16[64]) all-gather-start(%y), channel_id=2
  %c = bf16[64] all-gather(%z), channel_id=2
  %d = bf16[64] all-gather(%z), channel_id=3
"""


def test_pieces_of_one_collective_count_once():
    assert aot._collectives(TEXT) == {"all-reduce": 1, "all-gather": 2}


def test_what_is_donated_counts_once():
    found = aot.Compiled(10, 8, 7, 5, {}, 1.0)
    assert found.peak == 16


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(("width", "causal"), [(72, False), (128, True)], ids=["vision", "text"])
def test_splash_compiles_for_a_tpu(width, causal):
    """Forward and backward, with lengths and with segments, by the TPU's own compiler."""
    mesh = parallel.make_mesh({}, aot.topology("v5e:2x2")[:1])
    place = jax.sharding.NamedSharding(mesh, P())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    masks = {"segments": array(jnp.int32, 1, 640)} if causal else {"lengths": array(jnp.int32, 1)}

    def loss(q, k, v, masks):
        pair = {"segments": (masks["segments"],) * 2} if causal else masks
        out, _ = splash.attention(q, k, v, causal=causal, **pair)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    q, kv = (array(jnp.bfloat16, 1, 640, heads, width) for heads in (4, 2))
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    assert not aot.compiled(lambda: step.lower(q, kv, kv, masks)).collectives
