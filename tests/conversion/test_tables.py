"""The tables of FLUX.2, its VAE and Qwen3 cover every key and shape of the released layouts."""

import math

import pytest

from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.qwen3.config import VARIANTS
from conversion import flux2, qwen3, vae
from conversion.rules import file_specs
from tests.conversion import toy

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def klein_diffusers(d: int, c: int, double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layout (reference sheet, section 2.8)."""
    m = 3 * d
    shapes = {
        "time_guidance_embed.timestep_embedder.linear_1": (d, 256),
        "time_guidance_embed.timestep_embedder.linear_2": (d, d),
        "double_stream_modulation_img.linear": (6 * d, d),
        "double_stream_modulation_txt.linear": (6 * d, d),
        "single_stream_modulation.linear": (3 * d, d),
        "x_embedder": (d, 128),
        "context_embedder": (d, c),
        "norm_out.linear": (2 * d, d),
        "proj_out": (128, d),
    }
    for i in range(double):
        block = f"transformer_blocks.{i}"
        square = [*_QKV, *_ADDED, "to_out.0", "to_add_out"]
        shapes |= {f"{block}.attn.{name}": (d, d) for name in square}
        norms = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]
        shapes |= {f"{block}.attn.{name}": (128,) for name in norms}
        for mlp in ("ff", "ff_context"):
            shapes |= {f"{block}.{mlp}.linear_in": (2 * m, d), f"{block}.{mlp}.linear_out": (d, m)}
    for i in range(single):
        block = f"single_transformer_blocks.{i}.attn"
        shapes |= {f"{block}.to_qkv_mlp_proj": (9 * d, d), f"{block}.to_out": (d, 4 * d)}
        shapes |= {f"{block}.norm_q": (128,), f"{block}.norm_k": (128,)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def klein_bfl(d: int, c: int, double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of BFL's files (reference sheet, section 6.1)."""
    m = 3 * d
    shapes = {
        "img_in.weight": (d, 128),
        "txt_in.weight": (d, c),
        "time_in.in_layer.weight": (d, 256),
        "time_in.out_layer.weight": (d, d),
        "double_stream_modulation_img.lin.weight": (6 * d, d),
        "double_stream_modulation_txt.lin.weight": (6 * d, d),
        "single_stream_modulation.lin.weight": (3 * d, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.linear.weight": (128, d),
    }
    for i in range(double):
        for s in ("img", "txt"):
            block = f"double_blocks.{i}.{s}"
            shapes |= {
                f"{block}_attn.qkv.weight": (3 * d, d),
                f"{block}_attn.proj.weight": (d, d),
                f"{block}_attn.norm.query_norm.scale": (128,),
                f"{block}_attn.norm.key_norm.scale": (128,),
                f"{block}_mlp.0.weight": (2 * m, d),
                f"{block}_mlp.2.weight": (d, m),
            }
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= {
            f"{block}.linear1.weight": (9 * d, d),
            f"{block}.linear2.weight": (d, 4 * d),
            f"{block}.norm.query_norm.scale": (128,),
            f"{block}.norm.key_norm.scale": (128,),
        }
    return shapes


KLEIN = {"klein_4b": (3072, 7680, 5, 20), "klein_9b": (4096, 12288, 8, 24)}


@pytest.mark.parametrize(
    "variant, diffusers, bfl, parameters",
    [("klein_4b", 169, 149, 3_875_544_576), ("klein_9b", 233, 201, 9_078_581_248)],
)
def test_klein_tables_cover_every_key_and_shape(variant, diffusers, bfl, parameters):
    abstract = toy.component("transformer", TRANSFORMER_VARIANTS[variant]).abstract()
    for table, expected, tensors in (
        (flux2.DIFFUSERS, klein_diffusers(*KLEIN[variant]), diffusers),
        (flux2.BFL, klein_bfl(*KLEIN[variant]), bfl),
    ):
        specs = file_specs(table, abstract)
        assert specs == expected
        assert len(specs) == tensors
        assert sum(map(math.prod, specs.values())) == parameters


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize(
    "variant, parameters", [("klein", 84_046_115), ("small_decoder", 62_373_091)]
)
def test_vae_tables_hold_251_entries(layout, variant, parameters):
    cfg = VAE_VARIANTS[variant]
    specs = file_specs(vae.table(cfg, layout), toy.component("vae", cfg).abstract())
    assert len(specs) == 251
    assert specs.pop("bn.num_batches_tracked") == ()
    buffers = math.prod(specs.pop("bn.running_mean")) + math.prod(specs.pop("bn.running_var"))
    assert buffers == 256
    assert sum(map(math.prod, specs.values())) == parameters


@pytest.mark.parametrize(
    "variant, parameters", [("qwen3_4b", 4_022_468_096), ("qwen3_8b", 8_190_735_360)]
)
def test_qwen3_tables_cover_every_key_and_shape(variant, parameters):
    cfg = VARIANTS[variant]
    q, kv, d, f = cfg.heads * 128, cfg.kv_heads * 128, cfg.width, cfg.mlp_width
    expected = {"model.embed_tokens.weight": (151936, d), "model.norm.weight": (d,)}
    if not cfg.tied:
        expected["lm_head.weight"] = (151936, d)
    for i in range(36):
        layer = f"model.layers.{i}"
        expected |= {
            f"{layer}.self_attn.q_proj.weight": (q, d),
            f"{layer}.self_attn.k_proj.weight": (kv, d),
            f"{layer}.self_attn.v_proj.weight": (kv, d),
            f"{layer}.self_attn.o_proj.weight": (d, q),
            f"{layer}.self_attn.q_norm.weight": (128,),
            f"{layer}.self_attn.k_norm.weight": (128,),
            f"{layer}.mlp.gate_proj.weight": (f, d),
            f"{layer}.mlp.up_proj.weight": (f, d),
            f"{layer}.mlp.down_proj.weight": (d, f),
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.post_attention_layernorm.weight": (d,),
        }
    table = qwen3.TIED if cfg.tied else qwen3.UNTIED
    specs = file_specs(table, toy.component("text_encoder", cfg).abstract())
    assert specs == expected
    assert sum(map(math.prod, specs.values())) == parameters


def test_tied_encoders_do_not_write_a_head():
    tied = toy.component("text_encoder", toy.TEXT_ENCODER)
    assert "lm_head.weight" not in file_specs(tied.table("diffusers"), tied.abstract())
    untied = toy.component("text_encoder", toy.UNTIED)
    specs = file_specs(untied.table("diffusers"), untied.abstract())
    assert specs["lm_head.weight"] == (toy.UNTIED.vocab, toy.UNTIED.width)
