"""Sizes of the released models, and config.json files that must be refused."""

import dataclasses

import pytest

from clvr_jax import tree
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2 import transformer, vae
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3 import language


def test_exact_parameter_counts():
    dit = lambda name: tree.count(transformer.abstract_params(flux2.TRANSFORMER_VARIANTS[name]))
    assert dit("klein_4b") == 3_875_544_576
    assert dit("klein_9b") == 9_078_581_248
    statistics = 2 * 128  # of the latent BatchNorm
    autoencoder = lambda name: tree.count(vae.abstract_params(flux2.VAE_VARIANTS[name]))
    assert autoencoder("klein") == 84_046_115 + statistics
    assert autoencoder("small_decoder") == 62_373_091 + statistics
    text = lambda name: tree.count(language.abstract_params(qwen3.VARIANTS[name]))
    assert text("qwen3_4b") == 4_022_468_096
    assert text("qwen3_8b") == 8_190_735_360


def test_klein_needs_27_layers_of_the_text_encoder():
    for name, expected in {"qwen3_4b": 3_114_088_192, "qwen3_8b": 5_831_883_520}.items():
        cfg = dataclasses.replace(qwen3.VARIANTS[name], layers=27)
        assert tree.count(language.abstract_params(cfg, head=False)) == expected


READERS = {
    "transformer": (
        flux2.transformer_from_json,
        flux2.transformer_to_json,
        flux2.TRANSFORMER_VARIANTS,
    ),
    "vae": (flux2.vae_from_json, flux2.vae_to_json, flux2.VAE_VARIANTS),
    "text_encoder": (qwen3.from_json, qwen3.to_json, qwen3.VARIANTS),
}


@pytest.mark.parametrize("kind", READERS)
def test_config_json_round_trips(kind):
    read, write, variants = READERS[kind]
    for cfg in variants.values():
        assert read(write(cfg)) == cfg


@pytest.mark.parametrize("kind", READERS)
def test_unknown_and_missing_fields_are_named(kind):
    read, write, variants = READERS[kind]
    values = write(variants["tiny"])
    with pytest.raises(ValueError, match=r"config\.json has fields .* know: new_trick=True"):
        read(values | {"new_trick": True})
    needed = "latent_channels" if kind == "vae" else "num_attention_heads"
    with pytest.raises(ValueError, match=f"no field '{needed}'"):
        read({name: value for name, value in values.items() if name != needed})


@pytest.mark.parametrize(
    "kind,change",
    [
        ("transformer", {"guidance_embeds": True}),
        ("transformer", {"patch_size": 2}),
        ("transformer", {"out_channels": 32}),
        ("transformer", {"axes_dims_rope": [16, 56, 56]}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"act_fn": "gelu"}),
        ("vae", {"patch_size": [1, 1]}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder", {"attention_bias": True}),
        ("text_encoder", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("text_encoder", {"model_type": "qwen2"}),
    ],
)
def test_what_the_models_cannot_honour_is_refused(kind, change):
    read, write, variants = READERS[kind]
    with pytest.raises(ValueError, match=r"supports|not supported|must be|add up"):
        read(write(variants["tiny"]) | change)


def test_guidance_embeds_must_be_said_because_the_reference_defaults_to_true():
    values = flux2.transformer_to_json(flux2.TRANSFORMER_VARIANTS["tiny"])
    del values["guidance_embeds"]
    with pytest.raises(ValueError, match="guidance_embeds"):
        flux2.transformer_from_json(values)


def test_a_text_encoder_says_which_layers_are_read():
    cfg = qwen3.VARIANTS["miniature"]
    values = qwen3.to_json(cfg)
    assert values["text_encoder_out_layers"] == [1, 2, 3] and cfg.feature_width == 3 * cfg.width
    assert qwen3.from_json(values) == cfg
    assert "text_encoder_out_layers" not in qwen3.to_json(qwen3.VARIANTS["qwen3_4b"])


def test_tokens_of_the_miniature_are_much_narrower_than_its_transformer():
    dit, autoencoder = flux2.TRANSFORMER_VARIANTS["miniature"], flux2.VAE_VARIANTS["miniature"]
    assert dit.channels == 4 * autoencoder.latent_channels <= dit.width / 4
    assert dit.text_width == qwen3.VARIANTS["miniature"].feature_width
