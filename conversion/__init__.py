"""PyTorch checkpoints to and from clvr_jax: rule tables that run both ways."""
