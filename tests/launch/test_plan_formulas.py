"""Formulas of activations against what JAX's own trace keeps, and what XLA allocates."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.models.flux2 import transformer
from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import model as vl
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.models.qwen3_vl.config import VARIANTS as VLMS
from launch.plan import activations


def kept(run, params) -> list[tuple[int, int]]:
    """(leading size, bytes) of what JAX keeps for the backward pass, on a device that is no CPU."""
    with mock.patch.object(jax, "default_backend", lambda: "tpu"):
        backward = jax.eval_shape(lambda params: jax.vjp(run, params)[1], params)
    arrays = [x for x in jax.tree.leaves(backward) if getattr(x, "ndim", 0)]
    return [(x.shape[0], math.prod(x.shape) * x.dtype.itemsize) for x in arrays]


def per_layer_and_token(measure, layers: int, lengths: tuple[int, int] = (1024, 3072)) -> float:
    """Bytes of stacked arrays, recognised by their odd number of layers, that grow with length."""
    short, long = (
        sum(size for lead, size in measure(length) if lead == layers) for length in lengths
    )
    return (long - short) / layers / (lengths[1] - lengths[0])


@functools.cache
def klein_kept(remat: str, tokens: int):
    counts = {"double_blocks": 5, "single_blocks": 7}
    cfg = dataclasses.replace(TRANSFORMER_VARIANTS["klein_4b"], **counts)
    layout = Layout(64, (tokens // 32 - 2, 32))
    model = transformer.Transformer(cfg, remat=remat, implementation="blocked")
    inputs = [jnp.zeros((1, s, c), jnp.bfloat16) for s, c in ((tokens - 64, 128), (64, 7680))]
    run = lambda params: model.apply({"params": params}, *inputs, jnp.zeros(1), layout)
    return kept(run, transformer.abstract_params(cfg, jnp.bfloat16))


def language_kept(remat: str, tokens: int):
    cfg = dataclasses.replace(VLMS["qwen3_vl_8b"].text, layers=7)
    model = language.LanguageModel(cfg, remat=remat, implementation="blocked")
    ids = jnp.zeros((1, tokens), jnp.int32)
    run = lambda params: model.apply({"params": params}, ids, jnp.arange(tokens)[None])[0]
    return kept(run, language.abstract_params(cfg, jnp.bfloat16))


def vision_kept(remat: str, patches: int):
    whole = VLMS["qwen3_vl_8b"]
    cfg = dataclasses.replace(whole.vision, layers=7, deepstack=(0, 1, 2))
    model = vision.Vision(cfg, remat=remat, implementation="blocked")
    params = vl.abstract_params(dataclasses.replace(whole, vision=cfg), jnp.bfloat16)["visual"]
    pixels = jnp.zeros((1, patches, 768), jnp.bfloat16)
    places = vision.places([(patches // 32, 32)], cfg)
    places = jax.tree.map(jnp.asarray, places)
    return kept(lambda params: model.apply({"params": params}, pixels, places), params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
def test_the_formulas_are_what_a_layer_keeps(remat):
    """At real widths, by shapes alone. Norms' statistics are what is a few thousandths beyond."""
    klein, words = {"d": 3072, "h": 3072, "m": 9216}, {"d": 4096, "h": 4096, "g": 1024, "m": 12288}
    cases = (
        (activations.KLEIN_DOUBLE, klein_kept, 5, klein),
        (activations.KLEIN_SINGLE, klein_kept, 7, klein),
        (activations.LANGUAGE, language_kept, 7, words),
        (activations.VISION, vision_kept, 7, {"d": 1152, "h": 1152, "m": 4304}),
    )
    for table, measure, layers, widths in cases:
        stated = activations.per_token(table[remat], widths, activations.Ways(), 2)
        found = per_layer_and_token(functools.partial(measure, remat), layers)
        assert found == pytest.approx(stated, rel=5e-3), (found, stated)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_xla_keeps_what_the_formula_says(remat):
    """Compiled here for a CPU, float32: temporaries grow with depth as stated, within 5 %."""
    width, tokens = 64, 512
    cfg = dataclasses.replace(
        VLMS["tiny"].text, width=width, heads=4, head_width=16, mlp_width=192, mrope_section=None
    )

    def temporary(layers: int) -> int:
        own = dataclasses.replace(cfg, layers=layers)
        model = language.LanguageModel(own, remat=remat, implementation="blocked")

        def loss(params, ids):
            return jnp.sum(model.apply({"params": params}, ids, jnp.arange(tokens)[None])[0] ** 2)

        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        lowered = jax.jit(jax.grad(loss)).lower(language.abstract_params(own), ids)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    widths = {"d": 64, "h": 64, "g": 32, "m": 192}
    each = activations.per_token(activations.LANGUAGE[remat], widths, activations.Ways(), 4)
    grown = (temporary(12) - temporary(6)) / 6 / tokens
    assert grown == pytest.approx(each, rel=0.05), (grown, each)
