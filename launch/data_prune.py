"""What `launch.data prune` keeps of drawings, and who tells their stories anew."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from PIL import Image

from clvr_jax.backends.protocol import Options
from clvr_jax.data.images import read_image
from clvr_jax.data.prune import prune
from clvr_jax.data.trajectory import Trajectory

Tell = Callable[[Trajectory, Sequence[Image.Image]], list[str]]


@contextlib.contextmanager
def teller(source: str | None) -> Iterator[Tell | None]:
    """Give what tells a story, None without a model.

    Args:
      source: folder or hub id of a vision-language model, or "teacher".
    """
    if source is None:
        yield None
        return
    from clvr_jax.closed_loop.story import narrate
    from configs import vlm as configs
    from launch.drawing import models
    from launch.runtime import use_compile_cache

    use_compile_cache()
    config = configs.get_config("greedy")
    vlm, options = models.vlm(source, config), Options(max_tokens=config.max_tokens)
    try:
        yield lambda trajectory, pictures: narrate(vlm, trajectory, pictures, options)
    finally:
        vlm.close()


class Pruned:
    """Trajectories that ended by the model's own decision, without steps that led nowhere.

    Args:
      trajectories: as they were drawn.
      longest: steps, after pruning; longer ones are left out.
      tell: tells their stories anew.
    """

    def __init__(self, trajectories: Iterable[Trajectory], longest: int, tell: Tell | None):
        self._given, self._longest, self._tell = trajectories, longest, tell
        self.left_out: Counter[str] = Counter()
        self.steps = 0

    def __iter__(self) -> Iterator[Trajectory]:
        """Yield what is kept; counts the rest by why it is not."""
        for made in self._given:
            if made.outcome != "stopped":
                self.left_out[f"ended by {made.outcome}"] += 1
                continue
            short = prune(made)
            if len(short.steps) > self._longest:
                self.left_out[f"longer than {self._longest} steps"] += 1
                continue
            if self._tell is not None:
                pictures = [read_image(step.image) for step in short.steps]
                short = prune(short, self._tell(short, pictures))
            self.steps += len(made.steps) - len(short.steps)
            yield short

    def summary(self) -> str:
        """Return in words what was left out."""
        left = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
        return f"left out {self.steps} steps that led nowhere and {left or 'no'} trajectories"
