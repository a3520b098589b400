"""Sequences spread by tokens over the mesh axis `context` compute what one device computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import parallel
from clvr_jax.kernels.attention import attend
from clvr_jax.models.flux2 import transformer
from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl import model as vlm
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.tree import flatten
from launch import hlo
from launch.bench.weights import random_params

KLEIN = dataclasses.replace(TRANSFORMER_VARIANTS["tiny"], double_blocks=2, single_blocks=2)
TEXT = dataclasses.replace(qwen3_vl.VARIANTS["tiny"].text, layers=3)


def mesh_of(sizes):
    return parallel.make_mesh(sizes, jax.devices()[:8])


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def error(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()


def same_on(sizes, run, params, *given, tolerance=1e-5):
    """Outputs and gradients of parameters of `run(params, *given)` on a mesh and on one device."""

    @jax.jit
    def differentiated(params, *given):
        out, pull = jax.vjp(lambda params: run(params, *given), params)
        return out, pull(jnp.sin(jnp.arange(out.size).reshape(out.shape)).astype(out.dtype))[0]

    expected, wanted = differentiated(params, *given)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parallel.shardings(params, mesh))
        out, found = differentiated(placed, *given)
    assert error(out, expected) < tolerance
    wanted = flatten(wanted)
    for path, leaf in flatten(found).items():
        if np.any(wanted[path]):
            assert error(leaf, wanted[path]) < tolerance, path


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (Layout(8, (4, 6)), {"fsdp": 2, "context": 4}),
        # 28 tokens, of which neither stream divides; two calls of 22 and 6 queries
        (Layout(7, (3, 5), ((2, 3),), pattern="kv"), {"fsdp": 2, "tensor": 2, "context": 2}),
    ],
    ids=["full", "references"],
)
@pytest.mark.slow
def test_klein(layout, sizes):
    net = transformer.Transformer(KLEIN)
    params = random_params(
        transformer.abstract_params(KLEIN), 0, ("double_blocks", "single_blocks")
    )
    given = (
        normal(2, layout.image_tokens, KLEIN.channels),
        normal(2, layout.text, KLEIN.text_width, seed=1),
        jnp.array([0.3, 0.8]),
    )
    run = lambda params, *given: net.apply({"params": params}, *given, layout)
    same_on(sizes, run, params, *given)


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        pytest.param(24, {"fsdp": 2, "tensor": 2, "context": 2}, marks=pytest.mark.slow),
        (22, {"fsdp": 2, "context": 4}),
    ],
)
def test_language_model_with_segments(length, sizes):
    """Packed rows with pictures, cut across segments; 22 tokens are not divided by 4."""
    net = language.LanguageModel(TEXT, remat="attention")
    params = random_params(language.abstract_params(TEXT), 0, ("layers",))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, TEXT.vocab, (2, length)), jnp.int32)
    ends = jnp.array([[5, 13, 19], [1, 20, 20]])
    segments = 1 + jnp.sum(jnp.arange(length)[:, None] >= ends[:, None], axis=-1)
    segments = jnp.where(segments == 4, 0, segments)
    places = jnp.full((2, length), -1).at[:, 6:12].set(jnp.arange(6))
    features = normal(2, 6, 3, TEXT.width, seed=3)

    def run(params, ids, features):
        given = {"segments": segments, "features": features, "places": places}
        return net.apply({"params": params}, ids, jnp.arange(length)[None], **given)[0]

    same_on(sizes, run, params, ids, features)


@pytest.mark.slow
def test_vision():
    cfg = qwen3_vl.VARIANTS["tiny"]
    params = random_params({"visual": vlm.abstract_params(cfg)["visual"]}, 0, qwen3_vl.STACKED)
    places = jax.tree.map(jnp.asarray, vision.places([(4, 6), (2, 4)], cfg.vision, 24))
    net = vision.Vision(cfg.vision)
    run = lambda params, patches: net.apply({"params": params["visual"]}, patches, places)
    same_on({"fsdp": 4, "context": 2}, run, params, normal(2, 24, cfg.vision.patch_width))


@pytest.mark.parametrize("name", [pytest.param("reference", marks=pytest.mark.slow), "blocked"])
@pytest.mark.parametrize("masks", ["causal", "segments", "lengths", "offset", "several"])
def test_attention_and_its_gradients(name, masks):
    """Three query heads a key head, whose two heads four devices of `tensor` do not divide."""
    q, k, v = (normal(4, 16, heads, 8, seed=i) for i, heads in enumerate((12, 2, 2)))
    cotangent, given = normal(*q.shape, seed=4), {"implementation": name}
    if masks != "several":
        given["causal"] = True
    if masks == "segments":
        given["segments"] = jnp.asarray(np.sort(np.random.default_rng(5).integers(0, 4, (4, 16))))
    if masks == "lengths":
        given["lengths"] = jnp.array([16, 1, 7, 9])
    if masks == "offset":
        given["offset"] = jnp.array([0, 3, 9, 1])
        k, v = (jnp.concatenate([x, x[:, ::-1]], axis=1) for x in (k, v))

    @jax.jit
    def differentiated(q, k, v):
        def total(q, k, v):
            keys, values = (
                (k, v) if masks != "several" else ([k[:, :7], k[:, 7:]], [v[:, :7], v[:, 7:]])
            )
            out = attend(q, keys, values, **given)
            return jnp.sum(out * cotangent), out

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, expected), wanted = differentiated(q, k, v)
    for sizes in ({"tensor": 4, "context": 2}, {"data": 2, "tensor": 2, "context": 2}):
        with jax.set_mesh(mesh_of(sizes)):
            (_, out), found = differentiated(q, k, v)
        for ours, theirs in zip((out, *found), (expected, *wanted)):
            assert error(ours, theirs) < 2e-6


def test_weights_lie_apart_along_context_too():
    """And where the product of both axes does not divide, along fsdp alone."""
    mesh = mesh_of({"fsdp": 2, "tensor": 2, "context": 2})
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}}
    assert parallel.specs(tree, mesh)[0]["img_in/kernel"] == jax.P(("fsdp", "context"), None)
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((6, 6), jnp.float32)}}
    chosen, notes = parallel.specs(tree, mesh)
    assert chosen["img_in/kernel"] == jax.P("fsdp", None)
    assert notes["img_in/kernel"] == ["dimension 6 is not divided by fsdp*context=4: fsdp=2"]
    alone = parallel.make_mesh({"fsdp": 8}, jax.devices()[:8])
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}}
    assert parallel.specs(tree, alone)[0]["img_in/kernel"] == jax.P("fsdp", None)


def exchanged(mesh, abstract, function, *given):
    """(opcode, dimensions) of what a program exchanges: of each loop's body, then outside."""
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        parallel.shardings(abstract, mesh),
    )
    with jax.set_mesh(mesh):
        program = hlo.Program(jax.jit(function).lower(params, *given).compile().as_text())
    bodies = [*program.loops().values(), program.inside(program.entry)]
    kinds = lambda one: one.opcode.removesuffix("-start")
    return [
        [
            (kinds(one), dims)
            for one in body
            if kinds(one) in hlo.COLLECTIVES
            for _, dims in one.shapes
        ]
        for body in bodies
    ]


def test_blocks_gather_weights_keys_and_values():
    """A single block exchanges nothing else; a double block joins two streams besides."""
    layout, mesh = Layout(8, (4, 6)), parallel.make_mesh({"context": 4}, jax.devices()[:4])
    net = transformer.Transformer(KLEIN)
    given = normal(1, 24, KLEIN.channels), normal(1, 8, KLEIN.text_width), jnp.ones(1)
    run = lambda params, *given: net.apply({"params": params}, *given, layout)
    bodies = exchanged(mesh, transformer.abstract_params(KLEIN), run, *given)
    single, double = sorted(bodies[:-1], key=len)
    assert {kind for kind, _ in single} == {"all-gather"}
    with_tokens = lambda body: [one for one in body if one[0] == "all-gather" and 32 in one[1]]
    assert len(with_tokens(single)) == len(with_tokens(double)) == 2
    assert (len(single), sum(kind == "all-gather" for kind, _ in double)) == (6, 10)


def test_training_on_rows_exchanges_parameters_only():
    """Neither tokens, nor features, nor logits: not even to look up embeddings."""
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
    net = language.LanguageModel(TEXT, remat="attention")
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    length, features, chunk = 112, 21, 14  # no width is as long
    assert 8 * length >= TEXT.vocab  # more tokens than rows of the table, as in training
    ints = lambda *shape: jax.ShapeDtypeStruct((8, *shape), jnp.int32, sharding=rows)
    floats = lambda *shape: jax.ShapeDtypeStruct((8, *shape), jnp.float32, sharding=rows)

    def loss(params, ids, positions, segments, places, features, weights):
        given = {"segments": segments, "features": features, "places": places}
        hidden = net.apply({"params": params}, ids, positions, **given)[0]
        return language.cross_entropy(params, TEXT, hidden, ids, weights, chunk=chunk)

    ids, images = ints(length), floats(features, 3, TEXT.width)
    given = (ids, ints(length, 3), ids, ids, images, floats(length))
    bodies = exchanged(mesh, language.abstract_params(TEXT), jax.grad(loss), *given)
    dims = {size for body in bodies for _, dims in body for size in dims}
    assert TEXT.vocab in dims
    assert not dims & {length, features, chunk}, bodies
