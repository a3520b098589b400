"""A vision-language model on this machine's devices: sessions with caches, batched continuously."""

from clvr_jax.backends.local.vlm import LocalSession, LocalVlm

__all__ = ["LocalSession", "LocalVlm"]
