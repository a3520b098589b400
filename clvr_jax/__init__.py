"""clvr_jax: closed-loop verified reasoning for image generation, in JAX."""

__version__ = "0.1.0"
