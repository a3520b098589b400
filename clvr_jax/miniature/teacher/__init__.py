"""The scripted teacher: a strong vision-language model's part in the miniature, played by rules."""

from clvr_jax.miniature.teacher.policy import Policy
from clvr_jax.miniature.teacher.vlm import Teacher

__all__ = ["Policy", "Teacher"]
