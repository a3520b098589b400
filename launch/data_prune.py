"""What `launch.data prune` keeps of drawings, and who looks at them and tells their stories."""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from clvr_jax.backends.protocol import Options
from clvr_jax.data.images import read_image
from clvr_jax.data.prune import prune
from clvr_jax.data.trajectory import Trajectory

# from a pruned trajectory and its pictures to what `prune` is given beside it
Look = Callable[[Trajectory, Sequence[Image.Image]], dict[str, Any]]


@contextlib.contextmanager
def looker(source: str | None, verify: bool) -> Iterator[Look | None]:
    """Give what looks at a drawing and tells its story, None without a model.

    Args:
      source: folder or hub id of a vision-language model, or "teacher".
      verify: it also says of each picture whether it is what its step asked for.

    Raises:
      ValueError: to verify without a model.
    """
    if source is None:
        if verify:
            raise ValueError("--verify asks a model about every picture: give --vlm too")
        yield None
        return
    from clvr_jax.closed_loop import story
    from configs import vlm as configs
    from launch.drawing import models
    from launch.runtime import use_compile_cache

    use_compile_cache()
    config = configs.get_config("greedy")
    vlm, options = models.vlm(source, config), Options(max_tokens=config.max_tokens)

    def look(trajectory: Trajectory, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        given = vlm, trajectory, pictures, options
        right = story.verify(*given) if verify else []
        return {"told": story.narrate(*given), "right": right}

    try:
        yield look
    finally:
        vlm.close()


class Pruned:
    """Trajectories that ended by the model's own decision, without steps that led nowhere.

    Those with pictures that the model did not look at are left out.

    Args:
      trajectories: as they were drawn.
      longest: steps, after pruning; longer ones are left out.
      look: tells their stories anew, and perhaps verifies them.
    """

    def __init__(self, trajectories: Iterable[Trajectory], longest: int, look: Look | None):
        self._given, self._longest, self._look = trajectories, longest, look
        self.left_out: Counter[str] = Counter()
        self.steps = self.rejected = 0

    def __iter__(self) -> Iterator[Trajectory]:
        """Yield what is kept; counts the rest by why it is not."""
        for made in self._given:
            if made.outcome != "stopped":
                self.left_out[f"ended by {made.outcome}"] += 1
                continue
            if not all(step.metadata.get("shown", True) for step in made.steps):
                self.left_out["whose pictures the model did not all see"] += 1
                continue
            short = prune(made)
            if len(short.steps) > self._longest:
                self.left_out[f"longer than {self._longest} steps"] += 1
                continue
            if self._look is not None:
                pictures = [read_image(step.image) for step in short.steps]
                try:
                    said = self._look(short, pictures)
                except ValueError as error:  # an answer in no known form
                    print(f"left out: {error}", file=sys.stderr, flush=True)
                    self.left_out["the model gave no readable answer about"] += 1
                    continue
                short = prune(short, **said)
                self.rejected += sum(step.verdict == "rejected" for step in short.steps)
            self.steps += len(made.steps) - len(short.steps)
            yield short

    def summary(self) -> str:
        """Return in words what was left out."""
        left = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
        text = f"left out {self.steps} steps that led nowhere and {left or 'no'} trajectories"
        if self.rejected:
            text += f"; rejected {self.rejected} pictures that are not what their steps asked for"
        return text
