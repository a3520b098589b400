"""What compiled programs do beside arithmetic: collectives of tensor parallelism, weight copies."""

import jax
import jax.numpy as jnp
import pytest

from clvr_jax import parallel
from clvr_jax.models.flux2 import transformer
from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3 import decoder, language
from clvr_jax.models.qwen3.config import VARIANTS
from launch import hlo

TINY = TRANSFORMER_VARIANTS["tiny"]


def compiled(function, abstract, *inputs, mesh=None):
    """Optimised HLO of a function of parameters placed by the rules, and of inputs."""
    if mesh is None:
        return hlo.Program(jax.jit(function).lower(abstract, *inputs).compile().as_text())
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        parallel.shardings(abstract, mesh),
    )
    with jax.set_mesh(mesh):
        return hlo.Program(jax.jit(function).lower(placed, *inputs).compile().as_text())


def denoiser(layout, b=1, **fields):
    net = transformer.Transformer(TINY, **fields)
    inputs = (
        jnp.zeros((b, layout.image_tokens, TINY.channels)),
        jnp.zeros((b, layout.text, TINY.text_width)),
        jnp.zeros(b),
    )
    return lambda params, *given: net.apply({"params": params}, *given, layout), inputs


@pytest.fixture(scope="module")
def tensor_4():
    return parallel.make_mesh({"tensor": 4}, jax.devices()[:4])


@pytest.mark.parametrize(
    "layout", [Layout(8, (4, 4)), Layout(8, (4, 4), ((4, 2),), pattern="kv")], ids=["full", "kv"]
)
def test_a_tensor_parallel_block_reduces_once_per_output_projection(tensor_4, layout):
    """A double block has four output projections, a single block two; nothing is resharded."""
    function, inputs = denoiser(layout)
    abstract = transformer.abstract_params(TINY)
    program = compiled(function, abstract, *inputs, mesh=tensor_4)
    counts = [hlo.collectives(body) for body in program.loops().values()]
    assert sorted(counts, key=lambda count: -count["all-reduce"]) == [
        {"all-reduce": 4},
        {"all-reduce": 2},
    ]
    assert not hlo.collectives(program.inside(program.entry))  # and none outside the blocks


def test_a_tensor_parallel_text_layer_reduces_twice():
    mesh = parallel.make_mesh({"tensor": 2}, jax.devices()[:2])  # two key heads
    cfg = VARIANTS["tiny"]
    net = decoder.Decoder(cfg)
    function = lambda params, ids, lengths: net.apply({"params": params}, ids, lengths)
    inputs = jnp.zeros((1, 8), jnp.int32), jnp.ones(1, jnp.int32)
    program = compiled(function, language.abstract_params(cfg), *inputs, mesh=mesh)
    (body,) = program.loops().values()
    assert hlo.collectives(body) == {"all-reduce": 2}


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_fsdp_gathers_weights_and_never_activations(sizes):
    mesh = parallel.make_mesh(sizes, jax.devices()[:4])
    layout = Layout(7, (3, 5))  # no token count is a width
    function, inputs = denoiser(layout, b=4)
    program = compiled(function, transformer.abstract_params(TINY), *inputs, mesh=mesh)
    tokens = {layout.text, layout.image_tokens, layout.text + layout.image_tokens}
    for body in program.loops().values():
        counts = hlo.collectives(body)
        assert counts["all-reduce"] in ((2, 4) if "tensor" in sizes else (0,))
        assert set(counts) <= {"all-gather", "all-reduce"}, counts
        gathered = [one for one in body if one.opcode.startswith("all-gather")]
        assert gathered
        assert not any(tokens & set(dims) for one in gathered for _, dims in one.shapes)


def test_loops_and_their_iterations_are_found():
    function, inputs = denoiser(Layout(8, (4, 4)))
    program = compiled(function, transformer.abstract_params(TINY), *inputs)
    trips = program.trips()
    assert sorted(trips[body] for body in program.loops()) == [
        TINY.double_blocks,
        TINY.single_blocks,
    ]


def test_copies_of_weights_are_found():
    """A loop that slices a stacked matrix and adds nothing is a copy; a product reads in place."""

    def scanned(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x, kernels)[0]

    def unrolled(kernels, x):
        for kernel in kernels:
            x = jnp.sin(x @ kernel)
        return x

    x, stacked = jnp.zeros((4, 64)), jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
    found = hlo.weight_copies(compiled(scanned, stacked, x), [(64, 64)])
    if jax.default_backend() == "cpu":  # XLA's CPU compiler never fuses the slice
        assert [sum(copies.values()) for copies in found.values()] == [64 * 64 * 4]
    listed = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 6
    assert hlo.weight_copies(compiled(unrolled, listed, x), [(64, 64)]) == {}


GPU = """HloModule jit_f, is_scheduled=true

%fused_slice (p0: bf16[5,64,192], p1: s32[]) -> bf16[64,192] {
  %p0 = bf16[5,64,192]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  %ds = bf16[1,64,192]{2,1,0} dynamic-slice(%p0, %p1, %c, %c), dynamic_slice_sizes={1,64,192}
  ROOT %b = bf16[64,192]{1,0} bitcast(%ds)
}

%fused_gemm (p0: bf16[8,64], p1: bf16[5,64,192], p2: s32[]) -> bf16[8,192] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[5,64,192]{2,1,0} parameter(1)
  %ds = bf16[1,64,192]{2,1,0} dynamic-slice(%p1, %p2, %c, %c), dynamic_slice_sizes={1,64,192}
  ROOT %cc = bf16[8,192]{1,0} custom-call(%p0, %ds), custom_call_target="__cublas$gemm"
}

%body (arg: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %arg = (s32[], bf16[8,64]{1,0}) parameter(0)
  %copied = bf16[64,192]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %inplace = bf16[8,192]{1,0:T(8,128)} fusion(%x, %w, %i), kind=kCustom, calls=%fused_gemm
  %ars = (bf16[8,64]{1,0}, bf16[8,64]{1,0}) all-reduce-start(%a, %b), to_apply=%add
  %ard = (bf16[8,64]{1,0}, bf16[8,64]{1,0}) all-reduce-done(%ars)
  %ags = ((bf16[8,16]{1,0}), bf16[8,64]{1,0}) all-gather-start(%c), dimensions={1}
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i, %y)
}

ENTRY %main (w: bf16[5,64,192]) -> bf16[8,64] {
  %relaid = bf16[5,64,192]{1,2,0} copy(%w)
  %loop = (s32[], bf16[8,64]{1,0}) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_gpu_text_is_read():
    """A slice fused into its product is no copy; asynchronous collectives count by result."""
    program = hlo.Program(GPU)
    assert program.entry == "main"
    assert program.trips() == {"body": 5}
    assert hlo.collectives(program.loops()["body"]) == {"all-reduce": 2, "all-gather": 1}
    assert hlo.weight_copies(program, [(64, 192), (5, 64, 192)]) == {
        "main": {"relaid": 5 * 64 * 192 * 2},
        "body": {"copied": 64 * 192 * 2},
    }
