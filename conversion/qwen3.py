"""Qwen3 decoder: its names in transformers' layout (`models/qwen3/modeling_qwen3.py`)."""

from clvr_jax.models.qwen3.config import STACKED
from conversion.rules import Extra, Rule, Table

LINEAR = "o i -> i o"
HEADS = "(h k) i -> i h k"
SCALE = "d -> d"


def rules(theirs: str = "model.", ours: str = "") -> tuple[Rule, ...]:
    """Return the rules of a decoder whose names begin with `theirs` in files and `ours` here."""
    layer, layers = theirs + "layers.{layer}.", f"{ours}layers/"
    plain = {
        "self_attn.q_proj": ("kernel", HEADS),
        "self_attn.k_proj": ("kernel", HEADS),
        "self_attn.v_proj": ("kernel", HEADS),
        "self_attn.o_proj": ("kernel", LINEAR),
        "self_attn.q_norm": ("scale", SCALE),
        "self_attn.k_norm": ("scale", SCALE),
        "mlp.gate_proj": ("kernel", LINEAR),
        "mlp.up_proj": ("kernel", LINEAR),
        "mlp.down_proj": ("kernel", LINEAR),
        "input_layernorm": ("scale", SCALE),
        "post_attention_layernorm": ("scale", SCALE),
    }
    return (
        Rule(f"{theirs}embed_tokens.weight", f"{ours}embed_tokens/embedding", "v d -> v d"),
        *(
            Rule(f"{layer}{name}.weight", f"{layers}{name.replace('.', '/')}/{leaf}", pattern)
            for name, (leaf, pattern) in plain.items()
        ),
        Rule(f"{theirs}norm.weight", f"{ours}norm/scale", SCALE),
    )


def head(ours: str = "") -> Rule:
    """Return the rule of an untied head."""
    return Rule("lm_head.weight", f"{ours}lm_head/kernel", LINEAR)


def tied_head(theirs: str = "model.") -> Extra:
    """Return what a tied head is: absent, or the embedding again."""
    return Extra("lm_head.weight", same_as=f"{theirs}embed_tokens.weight")


UNTIED = Table((*rules(), head()), STACKED)
TIED = Table(rules(), STACKED, (tied_head(),))
