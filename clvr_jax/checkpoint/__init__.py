"""Checkpoints in Orbax's format: parameters leaf by leaf, and the states of training runs."""

from clvr_jax.checkpoint.params import ParamsReader, restore, save, write_params
from clvr_jax.checkpoint.runs import CheckpointError, Checkpoints, Keep, open_state

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Keep",
    "ParamsReader",
    "open_state",
    "restore",
    "save",
    "write_params",
]
