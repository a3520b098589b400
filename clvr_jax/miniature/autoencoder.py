"""How the miniature's VAE is trained: pictures through a noisy latent, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.miniature.render import keys, render
from clvr_jax.models.flux2.vae import Vae, patches
from clvr_jax.typing import Array, Float, Images, Params, PRNGKey, UInt8

KL = 5e-4  # weight of a nat of a latent channel, against an error of 1 of a pixel channel
SQUARE = 2.0  # weight of the squared error beside the absolute one


def loss(
    params: Params,
    adapters: Params,
    frozen: Mapping[str, Params],
    batch: Mapping[str, Any],
    key: PRNGKey,
    static: int,
    *,
    vae: Vae,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Any]]:
    """Return (sum of errors, sum of weights, parts of the error) by the trainer's contract.

    The error of a picture is the mean absolute error of its pixels, its squared error and the
    Kullback-Leibler divergence of its latent from a standard normal (Kingma and Welling 2013,
    arXiv 1312.6114). Values are those of pictures in [-1, 1].

    Args:
      params: of the VAE; its latent statistics have no gradient, see `with_statistics`.
      adapters, frozen: not used.
      batch: `codes` (b, 16), `seeds` (b,) and `weights` (b,).
      key: of the latent noise.
      static: pixels of the side that is looked at; cells are alike, so that a corner teaches as
        much for its size as the whole.
      vae: bound before training.
    """
    x = to_values(render(batch["codes"], keys(batch["seeds"]))[:, :static, :static])
    variables = {"params": params}
    mean, log_var = vae.apply(variables, x, method="posterior")
    noise = jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
    y = vae.apply(variables, mean + noise, method="pixels")
    error = jnp.mean(jnp.abs(y - x), axis=(1, 2, 3))
    square = jnp.mean((y - x) ** 2, axis=(1, 2, 3))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_var) - 1 - log_var, axis=(1, 2, 3))
    weights = batch["weights"]
    total = lambda values: jnp.sum(weights * values)
    parts = {"absolute": total(error), "square": total(square), "kl": total(kl)}
    return total(error + SQUARE * square + KL * kl), jnp.sum(weights), parts


def to_values(pictures: UInt8[Array, "b y x 3"]) -> Images:
    """Return pictures as values in [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1


def with_statistics(
    vae: Vae, params: Params, pictures: UInt8[np.ndarray, "b y x 3"] | UInt8[Array, "b y x 3"]
) -> Params:
    """Return the parameters with the latent statistics of some pictures in them.

    The transformer sees latents normalised by them; training leaves them at mean 0, variance 1.

    Args:
      vae: the network.
      params: trained.
      pictures: some hundred or more, as they will be drawn.
    """

    @jax.jit
    def moments(batch):
        mean, _ = vae.apply({"params": params}, to_values(batch), method="posterior")
        z = patches(mean).reshape(-1, 4 * vae.cfg.latent_channels)
        return jnp.mean(z, axis=0), jnp.mean(z**2, axis=0)

    parts = [moments(pictures[i : i + 64]) for i in range(0, len(pictures), 64)]
    sizes = jnp.array([len(pictures[i : i + 64]) for i in range(0, len(pictures), 64)])
    first, second = (
        jnp.einsum("n,nc->c", sizes / len(pictures), jnp.stack(values))
        for values in zip(*parts, strict=True)
    )
    return {**params, "bn": {"mean": first, "var": second - first**2}}
