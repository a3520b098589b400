"""Qwen3 decoder: its names in transformers' layout (`models/qwen3/modeling_qwen3.py`)."""

from clvr_jax.models.qwen3.config import STACKED
from conversion.rules import Extra, Rule, Table

LINEAR = "o i -> i o"
HEADS = "(h k) i -> i h k"
SCALE = "d -> d"

_LAYER = "model.layers.{layer}."
_RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens/embedding", "v d -> v d"),
    Rule(_LAYER + "self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", HEADS),
    Rule(_LAYER + "self_attn.k_proj.weight", "layers/self_attn/k_proj/kernel", HEADS),
    Rule(_LAYER + "self_attn.v_proj.weight", "layers/self_attn/v_proj/kernel", HEADS),
    Rule(_LAYER + "self_attn.o_proj.weight", "layers/self_attn/o_proj/kernel", LINEAR),
    Rule(_LAYER + "self_attn.q_norm.weight", "layers/self_attn/q_norm/scale", SCALE),
    Rule(_LAYER + "self_attn.k_norm.weight", "layers/self_attn/k_norm/scale", SCALE),
    Rule(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate_proj/kernel", LINEAR),
    Rule(_LAYER + "mlp.up_proj.weight", "layers/mlp/up_proj/kernel", LINEAR),
    Rule(_LAYER + "mlp.down_proj.weight", "layers/mlp/down_proj/kernel", LINEAR),
    Rule(_LAYER + "input_layernorm.weight", "layers/input_layernorm/scale", SCALE),
    Rule(
        _LAYER + "post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", SCALE
    ),
    Rule("model.norm.weight", "norm/scale", SCALE),
)

UNTIED = Table((*_RULES, Rule("lm_head.weight", "lm_head/kernel", LINEAR)), STACKED)
TIED = Table(_RULES, STACKED, (Extra("lm_head.weight", same_as="model.embed_tokens.weight"),))
