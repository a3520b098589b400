"""Sizes of the FLUX.2 klein transformer and VAE, and their config.json in diffusers' layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clvr_jax.models.config import Fields

STACKED = ("double_blocks", "single_blocks")  # roots whose leaves carry a leading layer axis


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are what every klein checkpoint shares.

    Attributes:
      heads: attention heads; with `head_width` they give the model width.
      head_width: channels of a head, the sum of `rope_axes`.
      double_blocks: blocks with separate text and image streams.
      single_blocks: blocks on the joint sequence.
      text_width: width of the text features (three hidden states of the text encoder).
      channels: latent channels of a token, in and out.
      mlp_ratio: MLP inner width over model width.
      rope_axes: rotary channels given to each of the position axes T, H, W, L.
      rope_theta: base of the rotary frequencies.
      time_width: width of the timestep sinusoid.
      eps: epsilon of every LayerNorm and RMSNorm.
    """

    heads: int
    head_width: int
    double_blocks: int
    single_blocks: int
    text_width: int
    channels: int = 128
    mlp_ratio: float = 3.0
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    time_width: int = 256
    eps: float = 1e-6

    def __post_init__(self):
        if sum(self.rope_axes) != self.head_width:
            raise ValueError(
                f"rope_axes {self.rope_axes} add up to {sum(self.rope_axes)}, "
                f"but head_width is {self.head_width}; they must be equal"
            )
        if len(self.rope_axes) != 4 or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes must be four even numbers (T, H, W, L): {self.rope_axes}")

    @property
    def width(self) -> int:
        """Model width."""
        return self.heads * self.head_width

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLPs."""
        return int(self.width * self.mlp_ratio)


TRANSFORMER_VARIANTS = {
    "klein_4b": TransformerConfig(24, 128, double_blocks=5, single_blocks=20, text_width=7680),
    "klein_9b": TransformerConfig(32, 128, double_blocks=8, single_blocks=24, text_width=12288),
    "tiny": TransformerConfig(
        4, 16, double_blocks=2, single_blocks=3, text_width=96, channels=16, rope_axes=(4, 4, 4, 4)
    ),
    # of pictures of 64 x 64 pixels: tokens much narrower than the network, or noise never leaves
    "miniature": TransformerConfig(
        4, 32, double_blocks=2, single_blocks=4, text_width=384, channels=32, rope_axes=(8, 8, 8, 8)
    ),
}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the VAE; the defaults are the released one.

    Attributes:
      widths: channels of the encoder's levels, outermost first (the decoder runs them backwards).
      decoder_widths: the same for a decoder of other width (the small decoder), else None.
      layers_per_block: residual blocks of an encoder level; a decoder level has one more.
      latent_channels: channels of the latent picture before 2x2 patches are folded in.
      groups: groups of every GroupNorm.
      bn_eps: epsilon inside the square root of the latent BatchNorm.
    """

    in_channels: int = 3
    out_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    decoder_widths: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    groups: int = 32
    bn_eps: float = 1e-4

    @property
    def factor(self) -> int:
        """Pixels per token side: the convolutional factor times the 2x2 patch."""
        return 2 ** (len(self.widths) - 1) * 2


VAE_VARIANTS = {
    "klein": VaeConfig(),
    "small_decoder": VaeConfig(decoder_widths=(96, 192, 384, 384)),
    "tiny": VaeConfig(widths=(16, 24, 32, 32), latent_channels=4, groups=4, layers_per_block=1),
    "miniature": VaeConfig(widths=(8, 16, 32, 64), latent_channels=8, groups=4, layers_per_block=1),
}


def transformer_from_json(values: Mapping[str, Any]) -> TransformerConfig:
    """Read diffusers' transformer/config.json.

    Raises:
      ValueError: a field is missing, unknown, or has a value that klein does not have.
    """
    fields = Fields("transformer/config.json", values)
    fields.expect("_class_name", "Flux2Transformer2DModel")
    fields.expect("patch_size", 1)
    fields.expect("guidance_embeds", False)
    channels = fields.take("in_channels")
    fields.expect("out_channels", None, channels)
    if "guidance_embeds" not in values:  # the reference's default is True, which klein is not
        raise ValueError("transformer/config.json has no guidance_embeds; klein needs false")
    cfg = TransformerConfig(
        heads=fields.take("num_attention_heads"),
        head_width=fields.take("attention_head_dim"),
        double_blocks=fields.take("num_layers"),
        single_blocks=fields.take("num_single_layers"),
        text_width=fields.take("joint_attention_dim"),
        channels=channels,
        mlp_ratio=float(fields.take("mlp_ratio", 3.0)),
        rope_axes=tuple(fields.take("axes_dims_rope")),
        rope_theta=float(fields.take("rope_theta", 2000)),
        time_width=fields.take("timestep_guidance_channels", 256),
        eps=float(fields.take("eps", 1e-6)),
    )
    fields.done()
    return cfg


def transformer_to_json(cfg: TransformerConfig) -> dict[str, Any]:
    """Write diffusers' transformer/config.json; the inverse of `transformer_from_json`."""
    theta = int(cfg.rope_theta) if cfg.rope_theta == int(cfg.rope_theta) else cfg.rope_theta
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": cfg.channels,
        "out_channels": None,
        "num_layers": cfg.double_blocks,
        "num_single_layers": cfg.single_blocks,
        "attention_head_dim": cfg.head_width,
        "num_attention_heads": cfg.heads,
        "joint_attention_dim": cfg.text_width,
        "timestep_guidance_channels": cfg.time_width,
        "mlp_ratio": cfg.mlp_ratio,
        "axes_dims_rope": list(cfg.rope_axes),
        "rope_theta": theta,
        "eps": cfg.eps,
        "guidance_embeds": False,
    }


def vae_from_json(values: Mapping[str, Any]) -> VaeConfig:
    """Read diffusers' vae/config.json.

    Raises:
      ValueError: a field is missing, unknown, or has a value that this VAE does not have.
    """
    fields = Fields("vae/config.json", values)
    fields.expect("_class_name", "AutoencoderKLFlux2")
    widths = tuple(fields.take("block_out_channels"))
    decoder = fields.take("decoder_block_out_channels", None)
    fields.expect("down_block_types", ("DownEncoderBlock2D",) * len(widths))
    fields.expect("up_block_types", ("UpDecoderBlock2D",) * len(widths))
    fields.expect("act_fn", "silu")
    fields.expect("use_quant_conv", True)
    fields.expect("use_post_quant_conv", True)
    fields.expect("mid_block_add_attention", True)
    fields.expect("patch_size", (2, 2))
    # read by nothing here: size hint, an upcast that float32 norms replace, training momentum
    for unused in ("sample_size", "force_upcast", "batch_norm_momentum"):
        fields.take(unused, None)
    cfg = VaeConfig(
        in_channels=fields.take("in_channels", 3),
        out_channels=fields.take("out_channels", 3),
        widths=widths,
        decoder_widths=None if decoder is None else tuple(decoder),
        layers_per_block=fields.take("layers_per_block"),
        latent_channels=fields.take("latent_channels"),
        groups=fields.take("norm_num_groups", 32),
        bn_eps=float(fields.take("batch_norm_eps", 1e-4)),
    )
    fields.done()
    return cfg


def vae_to_json(cfg: VaeConfig) -> dict[str, Any]:
    """Write diffusers' vae/config.json; the inverse of `vae_from_json`."""
    levels = len(cfg.widths)
    return {
        "_class_name": "AutoencoderKLFlux2",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(cfg.widths),
        "decoder_block_out_channels": list(cfg.decoder_widths) if cfg.decoder_widths else None,
        "layers_per_block": cfg.layers_per_block,
        "act_fn": "silu",
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.groups,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": cfg.bn_eps,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    }
