"""What the compiled decode loop does beside arithmetic: no copies of weights or of the cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from clvr_jax import parallel
from clvr_jax.generate import text
from clvr_jax.models.qwen3 import language, serving
from clvr_jax.models.qwen3.config import VARIANTS
from launch import hlo
from launch.aot.text import rows as abstract_rows

PLACES = 320  # of the cache: no other dimension is as long
CFG = dataclasses.replace(VARIANTS["tiny"], vocab=640, width=48, layers=2, mlp_width=112)


def decode(b, mesh=None):
    """Optimised HLO of the decode program of a batch."""
    net = language.LanguageModel(CFG, scan=False, fused=True)
    params = serving.abstract(language.abstract_params(CFG), CFG)
    if mesh is not None:
        place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        params = jax.tree.map(place, params, parallel.shardings(params, mesh))
    steps, keep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((b,), bool)
    rows = abstract_rows(CFG, b, PLACES, jnp.float32)
    lowered = text.decode.lower(text.Networks(net), params, rows, steps, keep)
    return hlo.Program(lowered.compile().as_text()), params


@pytest.mark.parametrize("b", [1, 3])
def test_no_step_copies_weights_or_the_cache(b):
    program, params = decode(b)
    kernels = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
    assert hlo.weight_copies(program, kernels) == {}
    cache = PLACES, b * CFG.kv_heads * CFG.head_width
    found = hlo.weight_copies(program, [cache])
    assert not found.keys() & program.loops().keys(), found


def test_tensor_parallel_decoding_exchanges_activations_only():
    """Two sums a layer, the embedding's rows, the scores."""
    b = 3  # one row is written in another way on CPUs, with more exchanges
    mesh = parallel.make_mesh({"tensor": 2}, jax.devices()[:2])  # two key heads
    with jax.set_mesh(mesh):
        program, _ = decode(b, mesh)
    body = max(program.loops().values(), key=len)
    assert hlo.collectives(body) == {"all-reduce": 2 * CFG.layers + 1, "all-gather": 1}
    exchanged = [one for one in body if one.opcode.removesuffix("-start") in hlo.COLLECTIVES]
    assert max(math.prod(dims) for one in exchanged for _, dims in one.shapes) <= b * CFG.vocab
