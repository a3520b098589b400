"""Floating-point operations of an evaluation or a training step; multiply and add are two.

Formulas: Kaplan-style counts of products and attention, norms and element-wise work left out; they
agree with torch's FLOP counter on diffusers' FLUX.2 klein at 512 and 1024 pixels.
"""

import dataclasses
from collections.abc import Sequence

from clvr_jax.models.flux2.config import TransformerConfig, VaeConfig
from clvr_jax.models.flux2.layout import Layout, lower
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3_vl.config import VisionConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass, by how its backward pass grows from them.

    Attributes:
      products: products with weights.
      attention: scores, and weights times values.
    """

    products: int
    attention: int = 0

    @property
    def total(self) -> int:
        """FLOPs of the forward pass."""
        return self.products + self.attention

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.products + other.products, self.attention + other.attention)


@dataclasses.dataclass(frozen=True)
class Training:
    """FLOPs of forward and backward passes.

    Attributes:
      model: every product once: what model FLOP utilisation counts.
      again: what rematerialisation computes a second time, at most; with `model` the hardware's.
    """

    model: int = 0
    again: int = 0

    @property
    def hardware(self) -> int:
        """FLOPs that the device executes."""
        return self.model + self.again

    def __add__(self, other: "Training") -> "Training":
        return Training(self.model + other.model, self.again + other.again)

    def __mul__(self, times: int) -> "Training":
        return Training(self.model * times, self.again * times)


def training(cost: Cost, *, share: float = 1.0, remat: str = "none", adapters: int = 0) -> Training:
    """Return the FLOPs of training on what costs `cost` forward.

    A product costs as much again for the gradient of its input, and once more for that of its
    kernel if it is trained; attention has two operands and costs twice its forward. Attention that
    computes its scores anew in the backward pass (by half or all of a forward) is not counted.

    Args:
      cost: of the forward pass.
      share: part of the products whose kernels are trained: 1 all, 0 with adapters only.
      remat: what the backward pass keeps (`clvr_jax.models.layers.REMAT`).
      adapters: forward FLOPs of low-rank adapters, always trained.
    """
    model = round((2 + share) * cost.products) + 3 * (cost.attention + adapters)
    products = {"none": 0, "dots": 0, "attention": 1, "full": 1}[remat]
    attention = {"none": 0, "dots": 1, "attention": 0, "full": 1}[remat]
    again = products * (cost.products + adapters) + attention * cost.attention
    return Training(model, again)


def transformer(cfg: TransformerConfig, layout: Layout) -> int:
    """Return the FLOPs of one velocity evaluation of one picture."""
    return sum(part.total for part in transformer_parts(cfg, layout))


def transformer_parts(cfg: TransformerConfig, layout: Layout) -> tuple[Cost, Cost]:
    """Return the costs of one velocity evaluation: of the blocks, and of what surrounds them."""
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
    return Cost(products, 4 * d * pairs * blocks), Cost(embed + output + vectors)


def references(cfg: TransformerConfig, layout: Layout) -> int:
    """Return the FLOPs of filling the reference cache of `layout` once."""
    return transformer(cfg, layout.references_only())


def text_encoder(cfg: Qwen3Config, tokens: int) -> int:
    """Return the FLOPs of one padded prompt; of the causal square half is counted."""
    return decoder(cfg, [tokens]).total


def decoder(cfg: Qwen3Config, segments: Sequence[int]) -> Cost:
    """Return the cost of the layers on sequences of these lengths, causal and apart.

    Of a packed row the squares are those of its conversations, not of the row.
    """
    attention = cfg.head_width * (2 * cfg.heads + 2 * cfg.kv_heads)  # q, o and k, v
    products = 2 * sum(segments) * cfg.width * (attention + 3 * cfg.mlp_width)
    scores = sum(4 * tokens * tokens * cfg.heads * cfg.head_width // 2 for tokens in segments)
    return Cost(cfg.layers * products, cfg.layers * scores)


def head(cfg: Qwen3Config, tokens: int) -> Cost:
    """Return the cost of scoring the vocabulary at this many positions."""
    return Cost(2 * tokens * cfg.width * cfg.vocab)


def vision(cfg: VisionConfig, patches: int) -> int:
    """Return the FLOPs of one still of so many patches, mergers included."""
    return sum(part.total for part in vision_parts(cfg, patches))


def vision_parts(cfg: VisionConfig, patches: int) -> tuple[Cost, Cost]:
    """Return the costs of one still: of the blocks, and of patch embedding and mergers."""
    block = 2 * patches * cfg.width * (4 * cfg.width + 2 * cfg.mlp_width)
    scores = 4 * patches * patches * cfg.width
    cells, joined = patches // cfg.cell, cfg.cell * cfg.width
    merger = 2 * cells * joined * (joined + cfg.out_width)
    embed = 2 * patches * cfg.patch_width // cfg.temporal_patch * cfg.width
    around = (1 + len(cfg.deepstack)) * merger + embed
    return Cost(cfg.layers * block, cfg.layers * scores), Cost(around)


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


def image_training(
    cfg: TransformerConfig,
    text: Qwen3Config,
    vae: VaeConfig,
    layout: Layout,
    *,
    share: float = 1.0,
    adapters: int = 0,
    remat: str = "none",
    precomputed: bool = False,
) -> dict[str, Training]:
    """Return the FLOPs of training on one picture, by network.

    Args:
      cfg: of the transformer that is trained.
      text: of the text encoder, as many layers as are run; frozen, forward only.
      vae: of the VAE, which encodes the picture and its references; frozen, forward only.
      layout: of the sequence; pictures are `vae.factor` pixels a token.
      share, adapters, remat: see `training`.
      precomputed: features and latents come with the data.
    """
    blocks, around = transformer_parts(cfg, layout)
    trained = training(blocks, share=share, adapters=adapters, remat=remat)
    parts = {"transformer": trained + training(around, share=share)}
    if not precomputed:
        parts["text encoder"] = Training(text_encoder(text, layout.text))
        encoded = sum(
            vae_encode(vae, rows * vae.factor, cols * vae.factor)
            for rows, cols in (layout.noise, *layout.references)
        )
        parts["VAE"] = Training(encoded)
    return parts


def train_image(
    cfg: TransformerConfig, text: Qwen3Config, vae: VaeConfig, layout: Layout, **options
) -> int:
    """Return the model FLOPs of training on one picture; arguments as of `image_training`."""
    return sum(part.model for part in image_training(cfg, text, vae, layout, **options).values())


def vlm_training(
    text: Qwen3Config,
    vision: VisionConfig,
    segments: Sequence[int],
    patches: Sequence[int] = (),
    *,
    train_vision: bool = True,
    share: float = 1.0,
    adapters: int = 0,
    remat: str = "none",
) -> dict[str, Training]:
    """Return the FLOPs of training on one row, by part.

    Args:
      text: of the language model; every position is scored over the vocabulary.
      vision: of the tower.
      segments: tokens of the conversations that the row holds.
      patches: of its pictures.
      train_vision: whether all of the tower is trained, or it runs forward only.
      share, adapters, remat: see `training`; share and adapters are the language model's.
    """
    scored = training(head(text, sum(segments)), share=share)
    # chunks of logits are made a second time in the backward pass
    scored += Training(0, head(text, sum(segments)).total)
    layers = training(decoder(text, segments), share=share, adapters=adapters, remat=remat)
    parts = {"language layers": layers, "vocabulary head": scored}
    seen = Training()
    for count in patches:
        blocks, around = vision_parts(vision, count)
        if train_vision:
            seen += training(blocks, remat=remat) + training(around)
        else:
            seen += Training(blocks.total + around.total)
    if patches:
        parts["vision tower"] = seen
    return parts


def train_vlm(
    text: Qwen3Config,
    vision: VisionConfig,
    segments: Sequence[int],
    patches: Sequence[int] = (),
    **options,
) -> int:
    """Return the model FLOPs of training on one row; arguments as of `vlm_training`."""
    parts = vlm_training(text, vision, segments, patches, **options)
    return sum(part.model for part in parts.values())


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
