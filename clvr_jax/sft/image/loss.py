"""The flow-matching loss of pictures, given text and earlier pictures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp

from clvr_jax.diffusion import path
from clvr_jax.diffusion.path import TimeSampling
from clvr_jax.generate.image import Networks
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Latents, Params, PRNGKey, Times, UInt8

Pixels = UInt8[Array, "b height width 3"]
Grid = Float[Array, "b rows cols c"]
_REFERENCES = 16  # the references' keys begin here: the first two of a key are those of `draw`


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of the image model.

    Attributes:
      times: noise levels and their weights.
      bins: equal intervals of t whose losses are reported each.
      text_gradient: whether the text features in the batch are trained as well.
      reference_noise: most of the noise in the latents of references, as its standard deviation,
        drawn anew for each reference between 0 and this. What a model draws is never quite clean,
        and of a model that edits its own pictures the flaws add up; from such references it learns
        to take over what is there, not its flaws (after Ho et al., Cascaded Diffusion Models,
        arXiv 2106.15282, conditioning augmentation).

    Raises:
      ValueError: noise is negative.
    """

    times: TimeSampling = dataclasses.field(default_factory=TimeSampling)
    bins: int = 4
    text_gradient: bool = False
    reference_noise: float = 0.0

    def __post_init__(self):
        if self.reference_noise < 0:
            raise ValueError(f"reference_noise is {self.reference_noise}; it is 0 or more")


def loss(
    params: Params,
    adapters: Params,
    frozen: Mapping[str, Params],
    batch: Mapping[str, Any],
    key: PRNGKey,
    static: Layout,
    *,
    networks: Networks,
    settings: Settings,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Return (sum of weighted errors, sum of weights, errors by noise level).

    The error of a row is the mean over its noise tokens and channels of the squared difference to
    eps - x_0, in float32. References have no error of their own.

    Args:
      params: the transformer's, in the type to compute in.
      adapters: its adapter tree, or {}.
      frozen: `text_encoder` and `vae`; not used where the batch holds features instead.
      batch: rows of `Batches`, of either kind.
      key: of the noise and its levels, drawn for all rows of the micro-batch at once.
      static: what the sequence holds.
      networks: bound before training, as are
      settings: what is asked.

    The third value has `loss_t0`, ...: for each interval of t, from data to noise, the sum of the
    errors and of the weights of the rows that fell into it; and `error`, without the weights of
    `TimeSampling`, where there are any.
    """
    text, x0, references = conditions(frozen, batch, networks, settings.text_gradient)
    dtype = jax.tree.leaves(params)[0].dtype
    t, eps = draw(key, x0.shape[0], static, networks, settings)
    if settings.reference_noise:
        references = noised(references, key, settings.reference_noise)

    def velocity(x_t: Latents, t: Times) -> Latents:
        image = jnp.concatenate([x_t, *references], axis=1).astype(dtype)
        variables = {"params": params, "lora": adapters}
        return networks.transformer.apply(variables, image, text.astype(dtype), t, static)

    errors = path.flow_matching(velocity, x0, eps, t)
    weights = batch["weights"].astype(jnp.float32)
    scales = settings.times.weight(t, static.noise_tokens)
    aux = {}
    interval = jnp.minimum(jnp.floor(t * settings.bins), settings.bins - 1)
    for i in range(settings.bins):
        inside = weights * (interval == i)
        aux[f"loss_t{i}"] = jnp.sum(inside * errors), jnp.sum(inside)
    if settings.times.weighting != "none":
        aux["error"] = jnp.sum(weights * errors), jnp.sum(weights)
    return jnp.sum(weights * scales * errors), jnp.sum(weights), aux


def draw(
    key: PRNGKey, rows: int, layout: Layout, networks: Networks, settings: Settings
) -> tuple[Times, Latents]:
    """Return the noise level and the noise of each row, float32; the same on every mesh."""
    t_key, eps_key = jax.random.split(key)
    t = settings.times.draw(t_key, rows, layout.noise_tokens)
    shape = (rows, layout.noise_tokens, networks.transformer.cfg.channels)
    return t, constrain(jax.random.normal(eps_key, shape), "batch", None, None)


def noised(
    references: list[Float[Array, "b _ c"]], key: PRNGKey, most: float
) -> list[Float[Array, "b _ c"]]:
    """Return the latents of references with noise, of each row and reference its own.

    Args:
      references: of each row, in the order of the sequence.
      key: of the step; noise and its levels are drawn apart from those of `draw`.
      most: standard deviation that the noise stays below.
    """
    made = []
    for i, latents in enumerate(references):
        level_key, noise_key = jax.random.split(jax.random.fold_in(key, _REFERENCES + i))
        level = most * jax.random.uniform(level_key, (latents.shape[0], 1, 1))
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        made.append(latents + constrain(level * noise, "batch", None, None))
    return made


def conditions(
    frozen: Mapping[str, Params],
    batch: Mapping[str, Any],
    networks: Networks,
    text_gradient: bool = False,
) -> tuple[Float[Array, "b s features"], Latents, list[Float[Array, "b _ c"]]]:
    """Return text features, and the latents of the target and of each reference in float32.

    They are read from the batch where it holds them, and computed where it holds ids and pixels.
    With `text_gradient` there is a gradient of the text features, else of nothing here.
    """
    if "text" in batch:
        text, grids = batch["text"], [batch["latents"], *batch["reference_latents"]]
    else:
        text = encode_text(networks, frozen["text_encoder"], batch["ids"], batch["lengths"])
        pixels = [batch["pixels"], *batch["reference_pixels"]]
        grids = encode_pictures(networks, frozen["vae"], pixels)
    grids = jax.lax.stop_gradient(grids)
    if not text_gradient:
        text = jax.lax.stop_gradient(text)
    x0, *references = [
        constrain(einops.rearrange(z, "b y x c -> b (y x) c"), "batch", None, None) for z in grids
    ]
    references = [z.astype(jnp.float32) for z in references]
    return constrain(text, "batch", None, None), x0.astype(jnp.float32), references


def encode_text(
    networks: Networks, params: Params, ids: Int[Array, "b s"], lengths: Int[Array, "b"]
) -> Float[Array, "b s features"]:
    """Return the features of rendered, padded prompts, in the parameters' type."""
    return networks.text_encoder.apply({"params": params}, ids, lengths)


def encode_pictures(networks: Networks, params: Params, pixels: list[Any]) -> list[Any]:
    """Return the latents (b, rows, cols, c) of pictures (b, height, width, 3) uint8.

    Pictures of one size go through one copy of the encoder, one after the other: the program stays
    small, and so does its memory.
    """
    dtype = jax.tree.leaves(params)[0].dtype

    def encode(image: Pixels) -> Grid:
        image = (image.astype(jnp.float32) / 255.0 * 2.0 - 1.0).astype(dtype)
        image = constrain(image, "batch", None, None, None)
        return networks.vae.apply({"params": params}, image, method="encode")

    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(pixels):
        sizes.setdefault(image.shape, []).append(i)
    out: dict[int, Any] = {}
    for places in sizes.values():
        if len(places) == 1:
            out[places[0]] = encode(pixels[places[0]])
        else:
            encoded = jax.lax.map(encode, jnp.stack([pixels[i] for i in places]))
            out.update({i: encoded[n] for n, i in enumerate(places)})
    return [out[i] for i in range(len(pixels))]
