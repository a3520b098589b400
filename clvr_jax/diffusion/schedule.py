"""klein's noise schedule: where the sampler stands after each step.

Reference: BFL `sampling.py` (`get_schedule`, `compute_empirical_mu`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.typing import Array, Float

ROUNDINGS = ("none", "bfl", "diffusers")


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the shift of the schedule for `tokens` noise tokens (no text, no references).

    Above 4300 tokens one line in the token count serves all step counts; the drop there, from 2.31
    to 1.18 for 4 steps, is the reference's.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


def sigmas(tokens: int, steps: int) -> Float[np.ndarray, "steps_plus_one"]:
    """Return the noise levels from 1 down to 0, float32.

    Raises:
      ValueError: fewer than one step or token.
    """
    if steps < 1 or tokens < 1:
        raise ValueError(f"a schedule needs at least one step and one token: {steps}, {tokens}")
    shift = math.exp(empirical_mu(tokens, steps))
    raw = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return np.append(shift / (shift + 1.0 / raw - 1.0), 0.0).astype(np.float32)


def model_times(
    levels: Float[Array | np.ndarray, "..."], rounding: str = "none"
) -> Float[Array, "..."]:
    """Return the t that the network is given for a noise level.

    Args:
      levels: noise levels in [0, 1].
      rounding: "none" keeps float32. In bfloat16 both references round: "bfl" rounds sigma and
        then 1000 sigma, "diffusers" rounds 1000 sigma, divides by 1000 and multiplies again,
        rounding each time.

    Raises:
      ValueError: the rounding is unknown.
    """
    levels = jnp.asarray(levels, jnp.float32)
    # not a cast to bfloat16 and back: the compiler may leave that out
    half = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if rounding == "none":
        return levels
    if rounding == "bfl":
        return half(half(levels) * 1000.0) / 1000.0
    if rounding == "diffusers":
        return half(half(half(levels * 1000.0) / 1000.0) * 1000.0) / 1000.0
    raise ValueError(f"rounding {rounding!r} is unknown; choose from {', '.join(ROUNDINGS)}")
