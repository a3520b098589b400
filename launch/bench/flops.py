"""Floating-point operations of one evaluation, a multiply and an add counted as two.

Formulas: Kaplan-style counts of products and attention, norms and element-wise work left out; they
agree with torch's FLOP counter on diffusers' FLUX.2 klein at 512 and 1024 pixels.
"""

from clvr_jax.models.flux2.config import TransformerConfig, VaeConfig
from clvr_jax.models.flux2.layout import Layout, lower
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3_vl.config import VisionConfig


def transformer(cfg: TransformerConfig, layout: Layout) -> int:
    """Return the FLOPs of one velocity evaluation of one picture."""
    d, blocks = cfg.width, cfg.double_blocks + cfg.single_blocks
    plan = lower(layout)
    tokens = layout.text + layout.image_tokens
    products = 2 * tokens * (4 * d * d + 3 * d * cfg.mlp_width) * blocks
    pairs = sum(
        (call.query[1] - call.query[0])
        * (sum(stop - start for start, stop in call.keys) + call.cache * layout.cached_tokens)
        for call in plan.calls
    )
    embed = 2 * layout.text * cfg.text_width * d + 2 * layout.image_tokens * cfg.channels * d
    output = 2 * layout.noise_tokens * cfg.channels * d
    times = 1 if plan.zero is None else 2
    vectors = times * (2 * (cfg.time_width * d + d * d) + 2 * 15 * d * d) + 2 * 2 * d * d
    return products + 4 * d * pairs * blocks + embed + output + vectors


def references(cfg: TransformerConfig, layout: Layout) -> int:
    """Return the FLOPs of filling the reference cache of `layout` once."""
    return transformer(cfg, layout.references_only())


def text_encoder(cfg: Qwen3Config, tokens: int) -> int:
    """Return the FLOPs of one padded prompt; of the causal square half is counted."""
    attention = cfg.head_width * (2 * cfg.heads + 2 * cfg.kv_heads)  # q, o and k, v
    products = 2 * tokens * cfg.width * (attention + 3 * cfg.mlp_width)
    scores = 4 * tokens * tokens * cfg.heads * cfg.head_width // 2
    return cfg.layers * (products + scores)


def vision(cfg: VisionConfig, patches: int) -> int:
    """Return the FLOPs of one still of so many patches, mergers included."""
    block = 2 * patches * cfg.width * (4 * cfg.width + 2 * cfg.mlp_width)
    scores = 4 * patches * patches * cfg.width
    cells, joined = patches // cfg.cell, cfg.cell * cfg.width
    merger = 2 * cells * joined * (joined + cfg.out_width)
    embed = 2 * patches * cfg.patch_width // cfg.temporal_patch * cfg.width
    return cfg.layers * (block + scores) + (1 + len(cfg.deepstack)) * merger + embed


def vae_encode(cfg: VaeConfig, height: int, width: int) -> int:
    """Return the FLOPs of encoding one picture of this size in pixels."""
    total = _conv(height, width, cfg.in_channels, cfg.widths[0])
    inner = cfg.widths[0]
    for i, outer in enumerate(cfg.widths):
        total += _level(height, width, inner, outer, cfg.layers_per_block)
        inner = outer
        if i < len(cfg.widths) - 1:
            height, width = height // 2, width // 2
            total += _conv(height, width, outer, outer)
    total += _middle(height, width, inner)
    moments = 2 * cfg.latent_channels
    return total + _conv(height, width, inner, moments) + 2 * height * width * moments**2


def vae_decode(cfg: VaeConfig, height: int, width: int) -> int:
    """Return the FLOPs of decoding one picture to this size in pixels."""
    widths = (cfg.decoder_widths or cfg.widths)[::-1]
    scale = 2 ** (len(widths) - 1)
    height, width = height // scale, width // scale
    z = cfg.latent_channels
    total = 2 * height * width * z * z + _conv(height, width, z, widths[0])
    total += _middle(height, width, widths[0])
    inner = widths[0]
    for i, outer in enumerate(widths):
        total += _level(height, width, inner, outer, cfg.layers_per_block + 1)
        inner = outer
        if i < len(widths) - 1:
            height, width = height * 2, width * 2
            total += _conv(height, width, outer, outer)
    return total + _conv(height, width, inner, cfg.out_channels)


def _conv(height: int, width: int, i: int, o: int) -> int:
    """A 3x3 convolution with this output size."""
    return 2 * 9 * height * width * i * o


def _level(height: int, width: int, inner: int, outer: int, blocks: int) -> int:
    total = 0
    for i in (inner, *(outer,) * (blocks - 1)):
        total += _conv(height, width, i, outer) + _conv(height, width, outer, outer)
        total += 2 * height * width * i * outer if i != outer else 0
    return total


def _middle(height: int, width: int, c: int) -> int:
    places = height * width
    attention = 4 * 2 * places * c * c + 4 * places * places * c
    return _level(height, width, c, c, 2) + attention
