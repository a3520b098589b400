"""Checkpoints in Orbax's format: parameters leaf by leaf, and the states of training runs."""

from clvr_jax.checkpoint.params import ParamsReader, restore, save, write_params
from clvr_jax.checkpoint.runs import (
    CheckpointError,
    Checkpoints,
    Keep,
    delete,
    open_state,
    saved_steps,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Keep",
    "ParamsReader",
    "delete",
    "open_state",
    "restore",
    "save",
    "saved_steps",
    "write_params",
]
