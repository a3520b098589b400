"""Euler integration of a velocity field from noise to data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clvr_jax.typing import Array, Float


def euler(
    velocity: Callable[[Float[Array, "b *dims"], Float[Array, ""]], Float[Array, "b *dims"]],
    noise: Float[Array, "b *dims"],
    levels: Float[Array, "steps_plus_one"],
    times: Float[Array, "steps"],
) -> Float[Array, "b *dims"]:
    """Step x <- x + (next - level) v(x, t) down the levels; the state stays float32.

    Args:
      velocity: dx/dlevel = noise - data, given x and the network's t.
      noise: the start, standard normal; used as it is.
      levels: noise levels from 1 to 0.
      times: what the network is told at each step (`schedule.model_times`).
    """

    def step(x, now):
        level, after, t = now
        return x + (after - level) * velocity(x, t).astype(jnp.float32), None

    x, _ = jax.lax.scan(step, noise.astype(jnp.float32), (levels[:-1], levels[1:], times))
    return x


def guided(negative: Float[Array, "*dims"], positive: Float[Array, "*dims"], scale):
    """Classifier-free guidance on the velocity: v_neg + scale (v_pos - v_neg)."""
    return negative + scale * (positive - negative)
