"""Drawing in a closed loop: plan, draw, look, edit, stop; and what it is compared with."""

from clvr_jax.closed_loop.budget import Budget
from clvr_jax.closed_loop.loop import Loop
from clvr_jax.closed_loop.result import Result, Task

__all__ = ["Budget", "Loop", "Result", "Task"]
