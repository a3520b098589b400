"""From prompts and reference images to pixels, in four compiled programs per shape.

Text encoding, reference encoding, the whole denoising loop, and decoding are jitted functions of
(networks, shapes) alone: the second call with the same shapes compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.diffusion import sampler, schedule
from clvr_jax.generate.prompt import tokenize
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Cache, Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3.decoder import Decoder
from clvr_jax.typing import Array, Bool, Float, Int, Latents, Params, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class Networks:
    """The three networks, without parameters: what a compiled program is specialised to."""

    transformer: Transformer
    text_encoder: Decoder
    vae: Vae


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
      height: pixels, a multiple of the VAE's factor.
      width: the same.
      steps: velocity evaluations (4 for distilled weights; base weights want 28 to 50).
      guidance: classifier-free guidance; 1 means none (distilled weights), base weights want 4.
      text_tokens: text length including padding.
      pattern: attention pattern the weights were trained with.
      rounding: how the noise level is rounded before the network sees it (`schedule.model_times`).
    """

    height: int = 1024
    width: int = 1024
    steps: int = 4
    guidance: float = 1.0
    text_tokens: int = 512
    pattern: str = "full"
    rounding: str = "none"

    @property
    def evaluations(self) -> int:
        """Passes of a picture through the network: with guidance two a step."""
        return self.steps * (1 if self.guidance == 1.0 else 2)


@dataclasses.dataclass
class ImageModel:
    """Networks with their parameters and tokenizer.

    Attributes:
      networks: the networks.
      params: `{"transformer": ..., "text_encoder": ..., "vae": ...}`.
      tokenizer: a Hugging Face tokenizer.
      adapters: adapter tree of the transformer, or an empty dict.
    """

    networks: Networks
    params: Params
    tokenizer: Any
    adapters: Params = dataclasses.field(default_factory=dict)


def generate(
    model: ImageModel,
    prompts: Sequence[str],
    references: Sequence[np.ndarray] = (),
    seeds: Sequence[int] = (0,),
    settings: Settings | None = None,
    noise: Float[Array | np.ndarray, "b rows cols c"] | None = None,
) -> UInt8[np.ndarray, "prompts seeds height width 3"]:
    """Return one picture for every prompt and seed.

    Each prompt is encoded once for all its seeds, each reference once for all pictures. A picture
    depends on its prompt, references, seed and settings, not on its neighbours in the batch.

    Args:
      model: what samples.
      prompts: one or more prompts.
      references: pictures (height, width, 3) in [-1, 1] (`references.prepare`) that every prompt
        edits or draws from; sizes may differ.
      seeds: one picture per seed for each prompt.
      settings: how to sample; the defaults suit distilled weights.
      noise: start of every picture, in the order prompts x seeds, instead of drawing it by seed.

    Raises:
      ValueError: sizes are not multiples of the VAE's factor, a prompt is too long, or `noise`
        has another shape.
      FloatingPointError: a picture has values that are no numbers.
    """
    settings = settings or Settings()
    nets, params = model.networks, model.params
    layout = layout_of(nets, settings, [image.shape[:2] for image in references])
    count = len(prompts) * len(seeds)

    text, empty = _encoded(model, prompts, settings)
    text = jnp.repeat(text, len(seeds), axis=0)
    tokens = reference_tokens(nets, params["vae"], references, text.dtype)
    if noise is None:
        noise = jnp.tile(draw_noise(nets, layout, seeds), (len(prompts), 1, 1, 1))
    shape = (count, *layout.noise, nets.transformer.cfg.channels)
    if noise.shape != shape:
        raise ValueError(f"noise has shape {noise.shape}, {shape} is needed")
    images, finite = _drawn(model, layout, settings, noise, text, empty, tokens)
    require_finite(finite, [(prompt, seed) for prompt in prompts for seed in seeds])
    return einops.rearrange(images, "(p s) h w c -> p s h w c", p=len(prompts))


def generate_each(
    model: ImageModel,
    prompts: Sequence[str],
    references: Sequence[Sequence[np.ndarray]],
    seeds: Sequence[int],
    settings: Settings | None = None,
) -> tuple[UInt8[np.ndarray, "b height width 3"], Bool[np.ndarray, "b"]]:
    """Return a picture for each prompt with references and a seed of its own, all in one batch.

    Beside them stands for each whether it consists of numbers; where not, it shows nothing.

    Args:
      model: what samples.
      prompts: one for each picture.
      references: the pictures that each prompt edits, (height, width, 3) in [-1, 1]; as many for
        every prompt, and the first of all prompts of one size, and so on.
      seeds: one for each picture.
      settings: how to sample; the defaults suit distilled weights.

    Raises:
      ValueError: the lists differ in length, or the references in number or size.
    """
    settings = settings or Settings()
    nets, params = model.networks, model.params
    shapes = {tuple(image.shape[:2] for image in row) for row in references}
    if len({len(prompts), len(references), len(seeds)}) > 1 or len(shapes) != 1:
        raise ValueError(
            f"{len(prompts)} prompts, {len(references)} lists of references and {len(seeds)} seeds "
            f"with references of sizes {sorted(shapes)}: one each, of the same sizes in every row"
        )
    layout = layout_of(nets, settings, shapes.pop())
    text, empty = _encoded(model, prompts, settings)
    tokens = reference_tokens(
        nets, params["vae"], [np.stack(s) for s in zip(*references)], text.dtype
    )
    noise = draw_noise(nets, layout, seeds)
    return _drawn(model, layout, settings, noise, text, empty, tokens)


def require_finite(finite: Bool[np.ndarray, "b"], rows: Sequence[tuple[str, int]]) -> None:
    """Raise FloatingPointError if a picture does not consist of numbers.

    Args:
      finite: of each picture.
      rows: prompt and seed of each.
    """
    bad = [f"{rows[row][0][:40]!r} with seed {rows[row][1]}" for row in np.flatnonzero(~finite)]
    if bad:
        raise FloatingPointError(
            f"pictures with values that are no numbers: {', '.join(bad)}; the weights may be "
            "damaged, or float32 be needed (--config.dtype=float32)"
        )


def _encoded(model: ImageModel, prompts: Sequence[str], settings: Settings) -> tuple[Any, Any]:
    """Text features of prompts, and of the empty prompt where there is guidance."""
    texts = list(prompts) + ([""] if settings.guidance != 1.0 else [])
    ids, lengths = tokenize(model.tokenizer, texts, settings.text_tokens)
    text = encode_text(model.networks, model.params["text_encoder"], ids, lengths)
    return text[: len(prompts)], text[len(prompts) :] if settings.guidance != 1.0 else None


def _drawn(model, layout: Layout, settings: Settings, noise, text, empty, tokens) -> Any:
    """Pictures, and whether each is finite; tokens of references: of all rows, or one set each."""
    nets, params = model.networks, model.params
    cache = None
    if layout.references and layout.rule.cacheable:
        cache = extend_cache(nets, layout, params["transformer"], model.adapters, tokens, None)
        layout, tokens = layout.with_cache(), tokens[:, :0]
    latents = denoise(
        nets,
        layout,
        settings.steps,
        settings.rounding,
        params["transformer"],
        model.adapters,
        jnp.asarray(noise),
        text,
        tokens,
        cache,
        empty,
        jnp.float32(settings.guidance),
    )
    finite = jnp.isfinite(latents).all(axis=(1, 2, 3))
    return _fetched(decode(nets, params["vae"], latents)), _fetched(finite)


def layout_of(
    nets: Networks, settings: Settings, references: Sequence[tuple[int, int]] = ()
) -> Layout:
    """Return the sequence layout of pictures and references of these pixel sizes.

    Raises:
      ValueError: a side is not a positive multiple of the VAE's factor.
    """
    factor = nets.vae.cfg.factor
    sizes = [(settings.height, settings.width), *references]
    for height, width in sizes:
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(
                f"height {height}, width {width}: both must be positive multiples of {factor}"
            )
    noise, *rest = [(height // factor, width // factor) for height, width in sizes]
    return Layout(settings.text_tokens, noise, tuple(rest), pattern=settings.pattern)


def draw_noise(
    nets: Networks, layout: Layout, seeds: Sequence[int]
) -> Float[Array, "seeds rows cols c"]:
    """Return standard normal noise, each picture from its own seed, float32."""
    shape = (*layout.noise, nets.transformer.cfg.channels)
    return _noise(shape, jnp.asarray(seeds, jnp.uint32))


def reference_tokens(nets: Networks, params: Params, references, dtype) -> Latents:
    """Return the tokens of all references side by side, (1, tokens, c).

    References that are stacks (b, height, width, 3) give (b, tokens, c).
    """
    encoded = [
        einops.rearrange(
            encode_image(nets, params, image.reshape(-1, *image.shape[-3:]), dtype),
            "b y x c -> b (y x) c",
        )
        for image in references
    ]
    if not encoded:
        return jnp.zeros((1, 0, nets.transformer.cfg.channels), dtype)
    return jnp.concatenate(encoded, axis=1)


def _fetched(rows: Shaped[Array, "b ..."]) -> Shaped[np.ndarray, "b ..."]:
    """Return an array on the host, in every process also where several hold parts of it."""
    if rows.is_fully_addressable or rows.is_fully_replicated:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(rows, tiled=True)


@functools.partial(jax.jit, static_argnums=0)
def _noise(shape, seeds):
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(
    nets: Networks, params: Params, ids: Int[Array, "b s"], lengths: Int[Array, "b"]
) -> Float[Array, "b s features"]:
    """Return the text features that the transformer reads, in the parameters' dtype."""
    return nets.text_encoder.apply({"params": params}, ids, lengths)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_image(nets: Networks, params: Params, images, dtype) -> Float[Array, "b rows cols c"]:
    """Return the latents of pictures (b, height, width, 3) in [-1, 1]."""
    return nets.vae.apply({"params": params}, images.astype(dtype), method="encode")


@functools.partial(jax.jit, static_argnums=(0, 1))
def extend_cache(
    nets: Networks,
    layout: Layout,
    params: Params,
    adapters: Params,
    tokens: Latents,
    cache: Cache | None,
) -> Cache:
    """Return keys and values of `layout.cached` (given) and `layout.references` (tokens)."""
    variables = {"params": params, "lora": adapters}
    return nets.transformer.apply(variables, tokens, layout, cache, method="encode_references")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def denoise(
    nets: Networks,
    layout: Layout,
    steps: int,
    rounding: str,
    params: Params,
    adapters: Params,
    noise: Float[Array, "b rows cols c"],
    text: Float[Array, "b s features"],
    references: Float[Array, "shared m c"],
    cache: Cache | None,
    empty: Float[Array, "one s features"] | None,
    guidance: Float[Array, ""],
) -> Float[Array, "b rows cols c"]:
    """Run the whole sampling loop: one program per layout, step count and batch.

    Args:
      nets: the networks.
      layout: what the sequence holds.
      steps: velocity evaluations per picture (twice with guidance).
      rounding: see `schedule.model_times`.
      params: the transformer's parameters.
      adapters: the transformer's adapter tree, may be empty.
      noise: start of every picture.
      text: features of every picture's prompt.
      references: tokens of `layout.references`, of each picture or shared by all (first axis 1).
      cache: keys and values of `layout.cached`, likewise (second axis), or None.
      empty: features of the empty prompt for guidance, or None for no guidance.
      guidance: scale of the guidance.
    """
    b, dtype = noise.shape[0], text.dtype
    levels = jnp.asarray(schedule.sigmas(layout.noise_tokens, steps))
    times = schedule.model_times(levels[:-1], rounding)
    copies = 1 if empty is None else 2
    if empty is not None:  # one batch: empty prompts first
        text = jnp.concatenate([jnp.broadcast_to(empty, text.shape), text])

    def rows(x, axis):  # of every copy of every picture
        if x.shape[axis] == 1:
            return jnp.broadcast_to(x, (*x.shape[:axis], copies * b, *x.shape[axis + 1 :]))
        return jnp.concatenate([x] * copies, axis=axis)

    references = rows(references.astype(dtype), 0)
    cache = jax.tree.map(lambda x: rows(x, 1), cache)

    def velocity(x, t):
        image = jnp.concatenate([jnp.tile(x.astype(dtype), (copies, 1, 1)), references], axis=1)
        v = nets.transformer.apply(
            {"params": params, "lora": adapters},
            image,
            text,
            jnp.full((copies * b,), t),
            layout,
            cache,
        )
        v = v.astype(jnp.float32)
        return v if empty is None else sampler.guided(v[:b], v[b:], guidance)

    x = einops.rearrange(noise, "b y x c -> b (y x) c")
    x = sampler.euler(velocity, x, levels, times)
    return einops.rearrange(x, "b (y x) c -> b y x c", y=layout.noise[0]).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def decode(
    nets: Networks, params: Params, latents: Float[Array, "b rows cols c"]
) -> UInt8[Array, "b height width 3"]:
    """Return pixels, rounded to the nearest grey level."""
    images = nets.vae.apply({"params": params}, latents, method="decode").astype(jnp.float32)
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
