"""Toy Qwen3-VL folders as transformers saves them, and released names said by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.models.qwen3_vl.config import VARIANTS, Qwen3VLConfig, to_json
from tests.conversion import toy

UNTIED = VARIANTS["tiny"]
TIED = dataclasses.replace(UNTIED, text=dataclasses.replace(UNTIED.text, tied=True))

# what lies beside the weights; contents only have to survive
PROCESSOR = {
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"do_sample":  true}',
    "merges.txt": "#version: 0.2\n",
    "preprocessor_config.json": '{"patch_size":  16}',
    "tokenizer.json": '{"version":  "1.0"}',
    "tokenizer_config.json": '{"model_max_length":  512}',
    "video_preprocessor_config.json": "{}",
    "vocab.json": '{"a":  0}',
}
OLD_NAMES = (  # what released names were called in Qwen2-VL's files
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def tensors(cfg: Qwen3VLConfig, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    """Random tensors under transformers' names."""
    return toy.tensors("vlm", "diffusers", dtype, cfg, seed)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, or shapes, under older names."""
    for new, old in OLD_NAMES:
        values = {
            old + n.removeprefix(new) if n.startswith(new) else n: v for n, v in values.items()
        }
    return values


def folder(
    place: Path, cfg: Qwen3VLConfig = UNTIED, dtype=np.float32, shards: int = 0, **changes
) -> dict[str, np.ndarray]:
    """Write a transformers folder; return its tensors. `changes` are fields of config.json."""
    values = tensors(cfg, dtype)
    if shards:
        toy.save_sharded(place, values, "model", shards)
    else:
        toy.save(place / "model.safetensors", values)
    # spaced in a way of its own, so that a copied text can be told from a rewritten one
    (place / "config.json").write_text(json.dumps(to_json(cfg) | changes, indent=3))
    for name, text in PROCESSOR.items():
        (place / name).write_text(text)
    (place / "README.md").write_text("not copied")
    (place / "training_args.bin").write_bytes(b"not copied")
    return values


def released_names(cfg: Qwen3VLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layout (reference sheet, sections 1.3 and 2.10)."""
    t, v = cfg.text, cfg.vision
    q, kv, k = t.heads * t.head_width, t.kv_heads * t.head_width, t.head_width
    language, visual = "model.language_model", "model.visual"
    shapes = {
        f"{language}.embed_tokens.weight": (t.vocab, t.width),
        f"{language}.norm.weight": (t.width,),
        f"{visual}.patch_embed.proj.weight": (v.width, 3, 2, 16, 16),
        f"{visual}.patch_embed.proj.bias": (v.width,),
        f"{visual}.pos_embed.weight": (v.positions, v.width),
    }
    if not t.tied:
        shapes["lm_head.weight"] = (t.vocab, t.width)
    for i in range(t.layers):
        layer = f"{language}.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (q, t.width),
            f"{layer}.self_attn.k_proj.weight": (kv, t.width),
            f"{layer}.self_attn.v_proj.weight": (kv, t.width),
            f"{layer}.self_attn.o_proj.weight": (t.width, q),
            f"{layer}.self_attn.q_norm.weight": (k,),
            f"{layer}.self_attn.k_norm.weight": (k,),
            f"{layer}.mlp.gate_proj.weight": (t.mlp_width, t.width),
            f"{layer}.mlp.up_proj.weight": (t.mlp_width, t.width),
            f"{layer}.mlp.down_proj.weight": (t.width, t.mlp_width),
            f"{layer}.input_layernorm.weight": (t.width,),
            f"{layer}.post_attention_layernorm.weight": (t.width,),
        }
    for i in range(v.layers):
        block = f"{visual}.blocks.{i}"
        shapes |= _norm(f"{block}.norm1", v.width) | _norm(f"{block}.norm2", v.width)
        shapes |= _linear(f"{block}.attn.qkv", v.width, 3 * v.width)
        shapes |= _linear(f"{block}.attn.proj", v.width, v.width)
        shapes |= _linear(f"{block}.mlp.linear_fc1", v.width, v.mlp_width)
        shapes |= _linear(f"{block}.mlp.linear_fc2", v.mlp_width, v.width)
    cell = 4 * v.width
    later = [f"{visual}.deepstack_merger_list.{i}" for i in range(len(v.deepstack))]
    for merger, norm in ((f"{visual}.merger", v.width), *((name, cell) for name in later)):
        shapes |= _norm(f"{merger}.norm", norm)
        shapes |= _linear(f"{merger}.linear_fc1", cell, cell)
        shapes |= _linear(f"{merger}.linear_fc2", cell, t.width)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inside: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}
