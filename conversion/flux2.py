"""FLUX.2 klein transformer: its names in diffusers folders and in BFL (and ComfyUI) single files.

Sources: BFL `model.py`; diffusers `loaders/single_file_utils.py`, function
`convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from clvr_jax.models.flux2.config import STACKED
from conversion.rules import Extra, Rule, Table

LINEAR = "o i -> i o"
PARTS = "(part o) i -> i part o"
QKV = "(part h k) i -> i part h k"
SCALE = "k -> k"

_GUIDANCE = "klein has no guidance input: FLUX.2 dev, or another model of that architecture"


def _bfl_stream(s: str) -> tuple[Rule, ...]:
    """One stream (img, txt) of the double blocks."""
    theirs, ours = "double_blocks.{layer}." + s, f"double_blocks/{s}"
    return (
        Rule(f"{theirs}_attn.qkv.weight", f"{ours}/qkv/kernel", QKV),
        Rule(f"{theirs}_attn.norm.query_norm.scale", f"{ours}/query_norm/scale", SCALE),
        Rule(f"{theirs}_attn.norm.key_norm.scale", f"{ours}/key_norm/scale", SCALE),
        Rule(f"{theirs}_attn.proj.weight", f"{ours}/attn_out/kernel", LINEAR),
        Rule(f"{theirs}_mlp.0.weight", f"{ours}/mlp_in/kernel", PARTS),
        Rule(f"{theirs}_mlp.2.weight", f"{ours}/mlp_out/kernel", LINEAR),
    )


def _diffusers_stream(s: str, qkv: tuple[str, str, str], names: dict[str, str]) -> tuple[Rule, ...]:
    """One stream of the double blocks; q, k and v are equal row thirds of BFL's fused matrix."""
    theirs, ours = "transformer_blocks.{layer}.", f"double_blocks/{s}"
    return (
        Rule([f"{theirs}attn.{name}.weight" for name in qkv], f"{ours}/qkv/kernel", QKV),
        Rule(f"{theirs}attn.{names['q']}.weight", f"{ours}/query_norm/scale", SCALE),
        Rule(f"{theirs}attn.{names['k']}.weight", f"{ours}/key_norm/scale", SCALE),
        Rule(f"{theirs}attn.{names['out']}.weight", f"{ours}/attn_out/kernel", LINEAR),
        Rule(f"{theirs}{names['mlp']}.linear_in.weight", f"{ours}/mlp_in/kernel", PARTS),
        Rule(f"{theirs}{names['mlp']}.linear_out.weight", f"{ours}/mlp_out/kernel", LINEAR),
    )


def _single(fused_in: str, fused_out: str, query_norm: str, key_norm: str) -> tuple[Rule, ...]:
    """Single blocks, fused alike in both layouts: rows q k v gate up; columns attention, MLP."""
    return (
        Rule(fused_in, [("single_blocks/qkv/kernel", QKV), ("single_blocks/mlp_in/kernel", PARTS)]),
        Rule(
            fused_out,
            [("single_blocks/attn_out/kernel", LINEAR), ("single_blocks/mlp_out/kernel", LINEAR)],
            axis=1,
        ),
        Rule(query_norm, "single_blocks/query_norm/scale", SCALE),
        Rule(key_norm, "single_blocks/key_norm/scale", SCALE),
    )


BFL = Table(
    rules=(
        Rule("img_in.weight", "img_in/kernel", LINEAR),
        Rule("txt_in.weight", "txt_in/kernel", LINEAR),
        Rule("time_in.in_layer.weight", "time_in/in_layer/kernel", LINEAR),
        Rule("time_in.out_layer.weight", "time_in/out_layer/kernel", LINEAR),
        Rule(
            "double_stream_modulation_img.lin.weight",
            "double_stream_modulation_img/lin/kernel",
            PARTS,
        ),
        Rule(
            "double_stream_modulation_txt.lin.weight",
            "double_stream_modulation_txt/lin/kernel",
            PARTS,
        ),
        Rule("single_stream_modulation.lin.weight", "single_stream_modulation/lin/kernel", PARTS),
        *_bfl_stream("img"),
        *_bfl_stream("txt"),
        *_single(
            "single_blocks.{layer}.linear1.weight",
            "single_blocks.{layer}.linear2.weight",
            "single_blocks.{layer}.norm.query_norm.scale",
            "single_blocks.{layer}.norm.key_norm.scale",
        ),
        Rule("final_layer.adaLN_modulation.1.weight", "final_layer/adaLN_modulation/kernel", PARTS),
        Rule("final_layer.linear.weight", "final_layer/linear/kernel", LINEAR),
    ),
    stacked=STACKED,
    extras=(
        Extra("guidance_in.in_layer.weight", zero=_GUIDANCE),
        Extra("guidance_in.out_layer.weight", zero=_GUIDANCE),
    ),
    prefixes=("model.diffusion_model.", "diffusion_model."),
)

DIFFUSERS = Table(
    rules=(
        Rule("x_embedder.weight", "img_in/kernel", LINEAR),
        Rule("context_embedder.weight", "txt_in/kernel", LINEAR),
        Rule(
            "time_guidance_embed.timestep_embedder.linear_1.weight",
            "time_in/in_layer/kernel",
            LINEAR,
        ),
        Rule(
            "time_guidance_embed.timestep_embedder.linear_2.weight",
            "time_in/out_layer/kernel",
            LINEAR,
        ),
        Rule(
            "double_stream_modulation_img.linear.weight",
            "double_stream_modulation_img/lin/kernel",
            PARTS,
        ),
        Rule(
            "double_stream_modulation_txt.linear.weight",
            "double_stream_modulation_txt/lin/kernel",
            PARTS,
        ),
        Rule(
            "single_stream_modulation.linear.weight", "single_stream_modulation/lin/kernel", PARTS
        ),
        *_diffusers_stream(
            "img",
            ("to_q", "to_k", "to_v"),
            {"q": "norm_q", "k": "norm_k", "out": "to_out.0", "mlp": "ff"},
        ),
        *_diffusers_stream(
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            {"q": "norm_added_q", "k": "norm_added_k", "out": "to_add_out", "mlp": "ff_context"},
        ),
        *_single(
            "single_transformer_blocks.{layer}.attn.to_qkv_mlp_proj.weight",
            "single_transformer_blocks.{layer}.attn.to_out.weight",
            "single_transformer_blocks.{layer}.attn.norm_q.weight",
            "single_transformer_blocks.{layer}.attn.norm_k.weight",
        ),
        # diffusers stores scale before shift, BFL and we shift before scale
        Rule("norm_out.linear.weight", "final_layer/adaLN_modulation/kernel", PARTS, swap="part"),
        Rule("proj_out.weight", "final_layer/linear/kernel", LINEAR),
    ),
    stacked=STACKED,
    extras=(
        Extra("time_guidance_embed.guidance_embedder.linear_1.weight", zero=_GUIDANCE),
        Extra("time_guidance_embed.guidance_embedder.linear_2.weight", zero=_GUIDANCE),
    ),
)
