"""Meshes and sharding rules; a sharded network computes what the unsharded one does."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clvr_jax import parallel
from clvr_jax.models.flux2 import transformer, vae
from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3 import decoder, language, serving
from clvr_jax.models.qwen3.config import STACKED, VARIANTS
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl import model as vlm
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.tree import flatten
from launch.bench.weights import random_params

TINY = TRANSFORMER_VARIANTS["tiny"]
ABSTRACT = {
    "transformer": transformer.abstract_params(TINY),
    "text_encoder": language.abstract_params(VARIANTS["tiny"]),
    "vae": vae.abstract_params(VAE_VARIANTS["tiny"]),
    "vlm": vlm.abstract_params(qwen3_vl.VARIANTS["tiny"]),
    "serving": serving.abstract(language.abstract_params(VARIANTS["tiny"]), VARIANTS["tiny"]),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def place(abstract, mesh, stacked):
    """The same random weights on one device and on a mesh."""
    params = random_params(abstract, 0, stacked)
    return params, jax.device_put(params, parallel.shardings(abstract, mesh))


def difference(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    ("pattern", "b"),
    [
        pytest.param("full", 1, marks=pytest.mark.slow),
        ("kv", 4),
        pytest.param("full", 4, marks=pytest.mark.slow),
        pytest.param("kv", 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_transformer_equals_one_device(mesh_2x2x2, b, pattern):
    layout = Layout(8, (3, 5), ((2, 4),), pattern=pattern)
    net = transformer.Transformer(TINY)
    one, many = place(ABSTRACT["transformer"], mesh_2x2x2, ("double_blocks", "single_blocks"))
    inputs = (
        normal(b, layout.image_tokens, TINY.channels),
        normal(b, layout.text, TINY.text_width, seed=1),
        jnp.linspace(0.1, 1.0, b),
    )
    forward = jax.jit(lambda params, *given: net.apply({"params": params}, *given, layout))
    expected = forward(one, *inputs)
    with jax.set_mesh(mesh_2x2x2):
        out = forward(many, *inputs)
    assert difference(out, expected) < 3e-6


@pytest.mark.parametrize("b", [1, 4])
def test_sharded_text_encoder_equals_one_device(mesh_2x2x2, b):
    cfg = VARIANTS["tiny"]
    one, many = place(ABSTRACT["text_encoder"], mesh_2x2x2, STACKED)
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (b, 16))
    lengths = np.arange(3, 3 + b)
    forward = jax.jit(lambda params, *given: decoder.Decoder(cfg).apply({"params": params}, *given))
    expected = forward(one, ids, lengths)
    with jax.set_mesh(mesh_2x2x2):
        out = forward(many, ids, lengths)
    assert difference(out, expected) < 3e-6


@pytest.mark.slow
def test_gradients_have_the_sharding_and_values_of_one_device(mesh_2x2x2):
    layout = Layout(4, (2, 2))
    net = transformer.Transformer(TINY, remat="full")
    one, many = place(ABSTRACT["transformer"], mesh_2x2x2, ("double_blocks", "single_blocks"))
    inputs = (
        normal(4, 4, TINY.channels),
        normal(4, 4, TINY.text_width, seed=1),
        jnp.full(4, 0.5),
    )

    @jax.jit
    def gradient(params):
        loss = lambda p: jnp.mean(net.apply({"params": p}, *inputs, layout) ** 2)
        return jax.grad(loss)(params)

    expected = flatten(gradient(one))
    with jax.set_mesh(mesh_2x2x2):
        found = flatten(gradient(many))
    for path, leaf in found.items():
        assert difference(leaf, expected[path]) < 1e-5, path


@pytest.mark.parametrize("name", ABSTRACT)
def test_every_parameter_has_a_rule(mesh_2x2x2, name):
    chosen, notes = parallel.specs(ABSTRACT[name], mesh_2x2x2)
    flat = flatten(ABSTRACT[name])
    assert chosen.keys() == flat.keys()
    if name != "vae":
        assert not notes
        # nothing large stays on every device
        whole = [path for path, spec in chosen.items() if not any(spec) and flat[path].size > 4096]
        assert not whole


def test_sharded_vision_equals_one_device(mesh_2x2x2):
    cfg = qwen3_vl.VARIANTS["tiny"].vision
    abstract = {"visual": ABSTRACT["vlm"]["visual"]}
    one, many = place(abstract, mesh_2x2x2, qwen3_vl.STACKED)
    given = normal(4, 24, cfg.patch_width), vision.places([(4, 6), (2, 4), (4, 4), (2, 2)], cfg, 24)
    forward = jax.jit(lambda params, *given: vision.Vision(cfg).apply({"params": params}, *given))
    expected = forward(one["visual"], *given)
    with jax.set_mesh(mesh_2x2x2):
        out = forward(many["visual"], *given)
    assert difference(out, expected) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("mesh_too", [False, True])
def test_prepared_weights_compute_the_same(mesh_2x2x2, mesh_too):
    """Fused, unrolled and perhaps spread: the hidden states of the stacked model."""
    cfg = VARIANTS["tiny"]
    params = random_params(ABSTRACT["text_encoder"], 0, STACKED)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab, (2, 11)), jnp.int32)
    places = jnp.arange(11)[None]
    expected, _, _ = language.LanguageModel(cfg).apply({"params": params}, ids, places)
    shardings = parallel.shardings(ABSTRACT["serving"], mesh_2x2x2) if mesh_too else None
    ready = serving.prepare(params, cfg, shardings)
    assert jax.tree.map(jnp.shape, ready) == jax.tree.map(jnp.shape, ABSTRACT["serving"])
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].is_deleted()
    net = language.LanguageModel(cfg, scan=False, fused=True)
    if mesh_too:
        spec = ready["layers_0"]["mlp"]["gate_up_proj"]["kernel"].sharding.spec
        assert spec == P("fsdp", "tensor")
        with jax.set_mesh(mesh_2x2x2):
            out, _, _ = jax.jit(net.apply)({"params": ready}, ids, places)
    else:
        out, _, _ = net.apply({"params": ready}, ids, places)
    assert difference(out, expected) < 3e-6


def test_an_mlp_without_groups_is_refused():
    cfg = dataclasses.replace(VARIANTS["tiny"], mlp_width=49)
    with pytest.raises(ValueError, match="49 wide, which 2 key heads do not divide"):
        serving.abstract(language.abstract_params(cfg), cfg)


def test_no_rule_is_an_error(mesh_2x2x2):
    tree = {"vae": {"latent_norm": {"mean": jax.ShapeDtypeStruct((128,), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"no sharding rule matches vae/latent_norm/mean \(128,\)"):
        parallel.specs(tree, mesh_2x2x2)


def test_a_spec_of_the_wrong_rank_is_an_error(mesh_2x2x2):
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)}}
    with pytest.raises(ValueError, match=r"img_in/kernel has rank 2, the array \(2, 4, 6\)"):
        parallel.specs(tree, mesh_2x2x2)


def test_a_dimension_that_does_not_divide_is_replicated_and_reported(mesh_2x2x2, caplog):
    tree = {"img_in": {"kernel": jax.ShapeDtypeStruct((7, 6), jnp.float32)}}
    with caplog.at_level(logging.WARNING):
        placed = parallel.shardings(tree, mesh_2x2x2)
    assert placed["img_in"]["kernel"].spec == P(None, None)
    assert "img_in/kernel: dimension 7 is not divided by fsdp=2: replicated" in caplog.text


def test_only_the_axis_that_does_not_divide_is_dropped(mesh_2x2x2):
    spec, notes = parallel.fit(P(("data", "fsdp"), "tensor"), (6, 8), mesh_2x2x2)
    assert spec == P(None, "tensor")
    assert notes == ["dimension 6 is not divided by data*fsdp=4: replicated"]


def test_mesh_fills_one_axis():
    mesh = parallel.make_mesh({"fsdp": -1, "tensor": 2}, jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"model": 8}, r"unknown mesh axes \['model'\]; .*'data', 'fsdp', 'tensor', 'context'"),
        (
            {"fsdp": 3},
            r"mesh data=1 x fsdp=3 x tensor=1 x context=1 needs 3 devices, 8 are present",
        ),
        ({"fsdp": -1, "tensor": 16}, r"needs 16 devices, 8 are present"),
        ({"fsdp": -1, "tensor": -1}, r"8 are present"),
    ],
)
def test_mesh_errors_name_both_sides(sizes, text):
    with pytest.raises(ValueError, match=text):
        parallel.make_mesh(sizes, jax.devices()[:8])


def test_constrain_is_the_identity_outside_a_mesh():
    x = jnp.ones((2, 3))
    assert parallel.constrain(x, "batch", None) is x


def test_constrain_leaves_out_axes_that_do_not_divide(mesh_2x2x2):
    with jax.set_mesh(mesh_2x2x2):
        place = jax.jit(lambda x: parallel.constrain(x, "batch", "heads"))
        assert place(jnp.ones((4, 6))).sharding.spec == P(("data", "fsdp"), "tensor")
        assert place(jnp.ones((2, 6))).sharding.spec == P("data", "tensor")
        assert place(jnp.ones((1, 3))).sharding.is_fully_replicated
