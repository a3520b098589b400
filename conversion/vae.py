"""FLUX.2 VAE: its names in diffusers folders and in BFL's `ae.safetensors`.

Source: diffusers `scripts/convert_flux2_to_diffusers.py`. The two layouts differ in names, in the
order of the decoder's levels, and in the mid attention, whose projections are linear layers in
diffusers and 1x1 convolutions in BFL.
"""

from collections.abc import Iterator

import numpy as np

from clvr_jax.models.flux2.config import VaeConfig
from conversion.rules import Extra, Rule, Table

CONV = "o i kh kw -> kh kw i o"
UNIT_CONV = "o i 1 1 -> i o"
LINEAR = "o i -> i o"

_DIFFUSERS = {
    "down": "encoder.down_blocks.{i}.resnets.{j}",
    "downsample": "encoder.down_blocks.{i}.downsamplers.0.conv",
    "up": "decoder.up_blocks.{i}.resnets.{j}",
    "upsample": "decoder.up_blocks.{i}.upsamplers.0.conv",
    "shortcut": "conv_shortcut",
    "mid": "mid_block.resnets.{j}",
    "attention": "mid_block.attentions.0",
    "norm": "group_norm",
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "norm_out": "conv_norm_out",
    "quant": "quant_conv",
    "post_quant": "post_quant_conv",
}
_BFL = {
    "down": "encoder.down.{i}.block.{j}",
    "downsample": "encoder.down.{i}.downsample.conv",
    "up": "decoder.up.{reversed}.block.{j}",
    "upsample": "decoder.up.{reversed}.upsample.conv",
    "shortcut": "nin_shortcut",
    "mid": "mid.block_{after}",
    "attention": "mid.attn_1",
    "norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "proj_out",
    "norm_out": "norm_out",
    "quant": "encoder.quant_conv",
    "post_quant": "decoder.post_quant_conv",
}


def table(cfg: VaeConfig, layout: str) -> Table:
    """Return the table of a VAE of these sizes; `layout` is "diffusers" or "bfl"."""
    names = {"diffusers": _DIFFUSERS, "bfl": _BFL}[layout]
    projection = {"diffusers": LINEAR, "bfl": UNIT_CONV}[layout]
    return Table(
        rules=(
            *_encoder(cfg, names, projection),
            *_decoder(cfg, names, projection),
            *_affine(names["quant"], "quant_conv", UNIT_CONV),
            *_affine(names["post_quant"], "post_quant_conv", UNIT_CONV),
            Rule("bn.running_mean", "bn/mean", "c -> c"),
            Rule("bn.running_var", "bn/var", "c -> c"),
        ),
        # counts training steps; nothing reads it
        extras=(Extra("bn.num_batches_tracked", write=np.zeros((), np.int64)),),
    )


def _encoder(cfg: VaeConfig, names: dict[str, str], projection: str) -> Iterator[Rule]:
    yield from _affine("encoder.conv_in", "encoder/conv_in", CONV)
    before = cfg.widths[0]
    for i, width in enumerate(cfg.widths):
        for j in range(cfg.layers_per_block):
            theirs = names["down"].format(i=i, j=j)
            yield from _resnet(theirs, f"encoder/down_{i}/resnet_{j}", names, before != width)
            before = width
        if i < len(cfg.widths) - 1:
            theirs = names["downsample"].format(i=i)
            yield from _affine(theirs, f"encoder/down_{i}/downsample", CONV)
    yield from _end("encoder", names, projection)


def _decoder(cfg: VaeConfig, names: dict[str, str], projection: str) -> Iterator[Rule]:
    yield from _affine("decoder.conv_in", "decoder/conv_in", CONV)
    widths = (cfg.decoder_widths or cfg.widths)[::-1]
    last = len(widths) - 1
    before = widths[0]
    for i, width in enumerate(widths):
        where = {"i": i, "reversed": last - i}  # we count in the order of execution, BFL backwards
        for j in range(cfg.layers_per_block + 1):
            theirs = names["up"].format(**where, j=j)
            yield from _resnet(theirs, f"decoder/up_{i}/resnet_{j}", names, before != width)
            before = width
        if i < last:
            theirs = names["upsample"].format(**where)
            yield from _affine(theirs, f"decoder/up_{i}/upsample", CONV)
    yield from _end("decoder", names, projection)


def _end(coder: str, names: dict[str, str], projection: str) -> Iterator[Rule]:
    """The mid block and the output layers."""
    for j in (0, 1):
        theirs = f"{coder}.{names['mid'].format(j=j, after=j + 1)}"
        yield from _resnet(theirs, f"{coder}/mid/resnet_{j}", names, False)
    attention = f"{coder}.{names['attention']}"
    yield from _norm(f"{attention}.{names['norm']}", f"{coder}/mid/attention/norm")
    for name in ("to_q", "to_k", "to_v", "to_out"):
        yield from _affine(
            f"{attention}.{names[name]}", f"{coder}/mid/attention/{name}", projection
        )
    yield from _norm(f"{coder}.{names['norm_out']}", f"{coder}/norm_out")
    yield from _affine(f"{coder}.conv_out", f"{coder}/conv_out", CONV)


def _resnet(theirs: str, ours: str, names: dict[str, str], shortcut: bool) -> Iterator[Rule]:
    for n in (1, 2):
        yield from _norm(f"{theirs}.norm{n}", f"{ours}/norm{n}")
        yield from _affine(f"{theirs}.conv{n}", f"{ours}/conv{n}", CONV)
    if shortcut:
        yield from _affine(f"{theirs}.{names['shortcut']}", f"{ours}/conv_shortcut", UNIT_CONV)


def _norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", f"{ours}/scale", "c -> c")
    yield Rule(f"{theirs}.bias", f"{ours}/bias", "c -> c")


def _affine(theirs: str, ours: str, pattern: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", f"{ours}/kernel", pattern)
    yield Rule(f"{theirs}.bias", f"{ours}/bias", "o -> o")
