"""Checkpoints in Orbax's format: parameters leaf by leaf, and the states of training runs."""

from clvr_jax.checkpoint.params import ParamsReader, restore, save, write_params
from clvr_jax.checkpoint.runs import CheckpointError, Checkpoints, Keep

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Keep",
    "ParamsReader",
    "restore",
    "save",
    "write_params",
]
