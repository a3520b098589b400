"""OpenAI-compatible HTTP over any vision-language model of `clvr_jax.backends.protocol`."""
