"""Array aliases shared by every room; the letters of every shape annotation:

b batch, l tokens (text first, then image), s text tokens, n image tokens, d width, h heads,
g key/value heads, k head width, f MLP width, c latent channels, r adapter rank, i o in and out.
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

Params = dict[str, Any]  # nested dict of arrays (or of jax.ShapeDtypeStruct)
PRNGKey = jax.Array

Tokens = Float[Array, "b l d"]
Latents = Float[Array, "b n c"]  # packed image tokens
Times = Float[Array, "b"]  # noise level in [0, 1]; 1 is pure noise
Images = Float[Array, "b height width 3"]  # values in [-1, 1]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Images",
    "Int",
    "Latents",
    "PRNGKey",
    "Params",
    "Shaped",
    "Times",
    "Tokens",
    "UInt8",
]
