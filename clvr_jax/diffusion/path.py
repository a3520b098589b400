"""The straight path from data to noise: x_t, its velocity, and at which t a network is trained.

x_t = (1 - t) x_0 + t eps with t = 1 pure noise, so that the velocity is dx/dt = eps - x_0
(Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.typing import Array, Float, Latents, PRNGKey, Times

DISTRIBUTIONS = ("uniform", "logit_normal")
WEIGHTINGS = ("none", "bell")


def interpolate(x0: Latents, eps: Latents, t: Times) -> Latents:
    """Return x_t = (1 - t) x_0 + t eps, each row at its own t."""
    t = t[:, None, None]
    return (1 - t) * x0 + t * eps


def flow_matching(
    velocity: Callable[[Latents, Times], Latents], x0: Latents, eps: Latents, t: Times
) -> Float[Array, "b"]:
    """Return every row's mean squared error of the velocity at x_t, in float32.

    Args:
      velocity: the network, given x_t (float32) and t.
      x0: clean latents, float32.
      eps: standard normal noise.
      t: noise levels in [0, 1].
    """
    v = velocity(interpolate(x0, eps, t), t).astype(jnp.float32)
    return jnp.mean((v - (eps - x0)) ** 2, axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class TimeSampling:
    """At which noise levels a network is trained, and how much each counts.

    The default is a choice. The training distribution of klein is not published; the sampler's own
    shift (`schedule.empirical_mu`, factors 6 to 10) is for inference and leaves little below
    t = 0.5. The logit-normal distribution with a shift that grows with the picture is that of
    Stable Diffusion 3 and FLUX.1, is what musubi-tuner uses for FLUX.2, and what its makers are
    reported to have confirmed to OneTrainer. Others: diffusers' scripts train FLUX.2 with
    `uniform`, shift 1; DiffSynth-Studio with `uniform`, shift e^0.8 = 2.2255 and `bell`.

    Attributes:
      distribution: uniform in [0, 1], or logit_normal: the sigmoid of a normal variable.
      mean: of the normal variable of logit_normal.
      std: the same.
      shift: factor a of t' = a t / (1 + (a - 1) t), which moves t towards noise for a > 1; 1 is no
        shift, "dynamic" takes FLUX.1's factor for the number of noise tokens (`dynamic_shift`).
      weighting: of the squared error: none, or bell (`bell`).
    """

    distribution: str = "logit_normal"
    mean: float | int = 0.0
    std: float | int = 1.0
    shift: float | int | str = "dynamic"
    weighting: str = "none"

    def __post_init__(self):
        for name, known in {"distribution": DISTRIBUTIONS, "weighting": WEIGHTINGS}.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}"
                )
        if self.std <= 0:
            raise ValueError(f"std is {self.std}; it must be positive")
        number = isinstance(self.shift, (int, float)) and self.shift > 0
        if self.shift != "dynamic" and not number:
            raise ValueError(f"shift is {self.shift!r}; give a positive factor or 'dynamic'")

    def factor(self, tokens: int) -> float:
        """Return the shift's factor for a picture of `tokens` noise tokens."""
        return dynamic_shift(tokens) if self.shift == "dynamic" else float(self.shift)

    def quantile(self, u: Float[Array | np.ndarray, "n"], tokens: int) -> Times:
        """Return the t below which a share `u` of the draws lies."""
        u = jnp.asarray(u, jnp.float32)
        if self.distribution == "logit_normal":
            u = jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))
        return shifted(u, self.factor(tokens))

    def draw(self, key: PRNGKey, count: int, tokens: int) -> Times:
        """Return `count` independent noise levels, float32."""
        return self.quantile(jax.random.uniform(key, (count,)), tokens)

    def weight(self, t: Times, tokens: int) -> Float[Array, "b"]:
        """Return the weight of the error at each t; its mean over the draws is 1."""
        if self.weighting == "none":
            return jnp.ones_like(t)
        with jax.ensure_compile_time_eval():
            middles = (np.arange(4096, dtype=np.float32) + 0.5) / 4096
            scale = float(jnp.mean(bell(self.quantile(middles, tokens))))
        return bell(t) / scale


def shifted(t: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """Return a t / (1 + (a - 1) t): the odds t / (1 - t) multiplied by a."""
    return factor * t / (1 + (factor - 1) * t)


def dynamic_shift(tokens: int) -> float:
    """Return FLUX.1's factor e^mu, mu on the line through 0.5 at 256 and 1.15 at 4096 tokens.

    Source: BFL's flux `sampling.py` (`get_lin_function`), diffusers' `calculate_shift`.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def bell(t: Times) -> Float[Array, "b"]:
    """Return exp(-2 (t - 1/2)^2) less its value at the ends, where it is 0.

    Source: DiffSynth-Studio's flow-matching scheduler (`set_training_weight`).
    """
    return jnp.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)
