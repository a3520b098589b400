"""FLOPs of training: against published or hand-counted numbers, and XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer, abstract_params
from clvr_jax.models.qwen3.config import VARIANTS
from clvr_jax.models.qwen3_vl.config import VARIANTS as VLMS
from launch.bench import flops
from launch.bench.flops import Cost


@pytest.mark.parametrize(
    ("variant", "references", "tflop"),
    [
        ("klein_4b", 0, 104),
        ("klein_4b", 1, 230),
        ("klein_4b", 2, 387),
        ("klein_9b", 0, 226),
        ("klein_9b", 1, 484),
        ("klein_9b", 2, 794),
    ],
)
def test_training_the_transformer_is_three_times_its_forward(variant, references, tflop):
    cfg = TRANSFORMER_VARIANTS[variant]
    layout = Layout(512, (64, 64), ((64, 64),) * references)
    found = flops.image_training(cfg, None, None, layout, precomputed=True)["transformer"]
    assert found.model / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert found.model == 3 * flops.transformer(cfg, layout) and found.again == 0
    full = flops.image_training(cfg, None, None, layout, precomputed=True, remat="full")
    assert full["transformer"].model == found.model
    assert full["transformer"].hardware / found.model == pytest.approx(4 / 3, rel=5e-3)


def test_frozen_encoders_run_forward_only():
    cfg, vae = TRANSFORMER_VARIANTS["klein_4b"], VAE_VARIANTS["klein"]
    text = dataclasses.replace(VARIANTS["qwen3_4b"], layers=27)
    layout = Layout(512, (64, 64), ((64, 64),))
    parts = flops.image_training(cfg, text, vae, layout)
    assert parts["text encoder"].model / 1e12 == pytest.approx(2.85, abs=0.005)
    assert parts["VAE"].model / 1e12 == pytest.approx(2 * 4.89, abs=0.02)  # picture and reference
    assert flops.train_image(cfg, text, vae, layout) == sum(p.model for p in parts.values())
    alone = flops.train_image(cfg, text, vae, layout, precomputed=True)
    assert alone == parts["transformer"].model


def test_the_language_model_costs_six_flops_a_weight_and_token():
    cfg = VLMS["qwen3_vl_8b"]
    parts = flops.vlm_training(cfg.text, cfg.vision, [1])
    assert sum(p.model for p in parts.values()) / 1e9 == pytest.approx(45.4, rel=2e-3)
    assert flops.train_vlm(cfg.text, cfg.vision, [4096]) / 1e12 == pytest.approx(201, rel=3e-3)
    pictures = flops.vlm_training(cfg.text, cfg.vision, [4096], [4096, 4096])["vision tower"]
    assert pictures.model / 1e12 == pytest.approx(35, rel=0.02)
    frozen = flops.vlm_training(cfg.text, cfg.vision, [4096], [4096], train_vision=False)
    assert frozen["vision tower"].model == flops.vision(cfg.vision, 4096)


def test_packed_conversations_do_not_see_one_another():
    cfg = VLMS["qwen3_vl_8b"]
    whole, halves = flops.decoder(cfg.text, [4096]), flops.decoder(cfg.text, [2048, 2048])
    assert whole.products == halves.products and whole.attention == 2 * halves.attention


def test_adapters_save_the_gradients_of_kernels():
    cost = Cost(products=100, attention=10)
    full, lora = flops.training(cost), flops.training(cost, share=0, adapters=1)
    assert full.model == 330 and lora.model == 200 + 30 + 3
    assert flops.training(cost, share=0.5).model == 280
    assert flops.training(cost, remat="full").hardware == 440
    assert flops.training(cost, remat="dots").again == 10


def test_xla_executes_what_is_counted():
    """Unrolled blocks: XLA counts a loop's body once. Norms and the like are the few per cent."""
    sizes = dict(heads=8, head_width=32, rope_axes=(8,) * 4, text_width=64)
    cfg = dataclasses.replace(
        TRANSFORMER_VARIANTS["tiny"], **sizes, double_blocks=1, single_blocks=1
    )
    layout = Layout(64, (8, 8))
    model = Transformer(cfg, remat="full", implementation="reference", scan=False)
    apart = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros((1, 64, 16)), jnp.zeros((1, 64, 64)), jnp.ones(1), layout
        )
    )["params"]

    def loss(params, image, text, t):
        return jnp.sum(model.apply({"params": params}, image, text, t, layout) ** 2)

    given = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 64, 16), (1, 64, 64), (1,)))
    compiled = jax.jit(jax.grad(loss)).lower(apart, *given).compile()
    counted = flops.image_training(cfg, None, None, layout, remat="full", precomputed=True)
    ratio = compiled.cost_analysis()["flops"] / counted["transformer"].hardware
    assert 0.88 < ratio < 1.12, ratio
    assert sum(x.size for x in jax.tree.leaves(apart)) == sum(
        x.size for x in jax.tree.leaves(abstract_params(cfg))
    )
