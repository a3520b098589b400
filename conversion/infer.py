"""Sizes of a model read off the tensor shapes of a single file, which carries no config.json."""

import re
from collections.abc import Mapping
from pathlib import Path

from clvr_jax.models.flux2.config import TransformerConfig, VaeConfig

Shapes = Mapping[str, tuple[int, ...]]


def transformer(shapes: Shapes, file: Path | str) -> TransformerConfig:
    """Return the sizes of a transformer in BFL's layout, names without prefix.

    Rotary axes, epsilons and rotary base cannot be seen in shapes; klein's are taken.

    Raises:
      ValueError: the file is another model (FLUX.1, FLUX.2 dev, a quantised one), or lacks a tensor
        that the sizes are read from.
    """
    _refuse_relatives(shapes, file)
    width, channels = _shape(shapes, "img_in.weight", file)
    head_width = _shape(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", file)[0]
    mlp_width = _shape(shapes, "double_blocks.0.img_mlp.2.weight", file)[1]
    if width % head_width or head_width % 8:
        raise ValueError(
            f"{file}: width {width} and head width {head_width} do not fit; expected heads of a "
            "multiple of 8 that divide the width"
        )
    return TransformerConfig(
        heads=width // head_width,
        head_width=head_width,
        double_blocks=_count(shapes, r"double_blocks\.(\d+)\."),
        single_blocks=_count(shapes, r"single_blocks\.(\d+)\."),
        text_width=_shape(shapes, "txt_in.weight", file)[1],
        channels=channels,
        mlp_ratio=mlp_width / width,
        rope_axes=(head_width // 4,) * 4,
        time_width=_shape(shapes, "time_in.in_layer.weight", file)[1],
    )


def vae(shapes: Shapes, file: Path | str) -> VaeConfig:
    """Return the sizes of a VAE in BFL's layout.

    The groups of the norms cannot be seen in shapes; the released 32 are taken.

    Raises:
      ValueError: 32 groups do not divide the widths, or a tensor is missing.
    """
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    widths = tuple(
        _shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", file)[0] for i in range(levels)
    )
    decoder = tuple(
        _shape(shapes, f"decoder.up.{i}.block.0.conv1.weight", file)[0] for i in range(levels)
    )
    cfg = VaeConfig(
        in_channels=_shape(shapes, "encoder.conv_in.weight", file)[1],
        out_channels=_shape(shapes, "decoder.conv_out.weight", file)[0],
        widths=widths,
        decoder_widths=None if decoder == widths else decoder,
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=_shape(shapes, "encoder.quant_conv.weight", file)[0] // 2,
    )
    if any(width % cfg.groups for width in (*widths, *decoder)):
        raise ValueError(
            f"{file}: widths {widths} are not multiples of {cfg.groups} groups; how many groups "
            "the norms have cannot be read from shapes: give --base=FOLDER with its vae/config.json"
        )
    return cfg


def _refuse_relatives(shapes: Shapes, file: Path | str) -> None:
    """Name the models whose files look like klein's."""
    relatives = {
        "double_blocks.0.img_mod.lin.weight": "FLUX.1 (modulation in every block)",
        "vector_in.in_layer.weight": "FLUX.1 (pooled text vector)",
        "double_blocks.0.img_mod.lin.bias": "FLUX.1 (modulation in every block)",
    }
    for name, model in relatives.items():
        if name in shapes:
            raise ValueError(f"{file} is {model}, found {name}; expected FLUX.2 klein")
    bias = next((name for name in shapes if name.endswith(".bias")), None)
    if bias is not None:
        raise ValueError(f"{file}: found {bias}; FLUX.2 klein has no biases")
    if shapes.get("img_in.weight", (0,))[0] == 6144:
        raise ValueError(f"{file} is FLUX.2 dev, img_in.weight has width 6144; expected klein")


def _shape(shapes: Shapes, name: str, file: Path | str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{file} has no tensor {name}; its sizes cannot be read without it")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that `pattern` finds at the start of a name."""
    found = (re.match(pattern, name) for name in shapes)
    return max((int(match[1]) for match in found if match), default=-1) + 1
