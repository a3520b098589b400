"""What the image model is trained on: every picture of every trajectory, given what led to it."""

import concurrent.futures
import dataclasses
from typing import Any, NamedTuple

from clvr_jax.data.buckets import Buckets
from clvr_jax.data.conditioning import Policy, condition
from clvr_jax.generate.prompt import render
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.sft.image import pictures
from clvr_jax.sft.image.pictures import Picture

_SHOWN = 10  # faults in one error message


class Sample(NamedTuple):
    """One picture of one trajectory, without its data.

    Attributes:
      trajectory: its index in the source.
      step: of the trajectory, from 0.
      static: what the sequence holds; samples of one layout go through one program.
    """

    trajectory: int
    step: int
    static: Layout


class Inputs(NamedTuple):
    """What a sample is made from.

    Attributes:
      text: the condition.
      target: the picture to be learnt.
      references: the pictures that it is drawn from, in the order of the sequence.
    """

    text: str
    target: Picture
    references: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a step of a trajectory becomes text and pictures.

    Attributes:
      policy: what of the trajectory the image model is given, and text lengths; recorded with the
        weights.
      buckets: picture sizes.
      pattern: attention pattern to train (`layout.PATTERNS`).
      rejected: whether pictures that the trajectory itself rejects are learnt too. They are always
        there for later steps to look at.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    buckets: Buckets = dataclasses.field(default_factory=Buckets)
    pattern: str = "full"
    rejected: bool = False

    def inputs(self, trajectory: Any, step: int) -> Inputs:
        """Return what the picture of a step is learnt from, pictures by their headers only.

        Raises:
          ValueError: a picture cannot be read or has no bucket, or the policy does not apply.
        """
        given = condition(trajectory, step, self.policy)
        image = lambda i: trajectory.steps[i].image
        return Inputs(
            given.text,
            pictures.target(image(step), self.buckets),
            tuple(pictures.reference(image(i), self.buckets) for i in given.references),
        )

    def layout(self, inputs: Inputs, tokenizer: Any) -> Layout:
        """Return the layout of a sample.

        Raises:
          ValueError: the text is longer than the policy's longest.
        """
        count = len(tokenizer.encode(render(inputs.text), add_special_tokens=False))
        tokens = lambda size: (size[0] // self.buckets.factor, size[1] // self.buckets.factor)
        return Layout(
            self.policy.bucket(count),
            tokens(inputs.target.size),
            tuple(tokens(picture.size) for picture in inputs.references),
            pattern=self.pattern,
        )


def index(source: Any, tokenizer: Any, rules: Rules, *, threads: int = 8) -> list[Sample]:
    """Return the samples of all trajectories, in order; no picture is decoded.

    Args:
      source: trajectories with absolute image paths, by index.
      tokenizer: the text encoder's.
      rules: what is learnt from what.
      threads: trajectories looked at the same time.

    Raises:
      ValueError: some trajectories cannot be used; tells which and why, ten of them.
    """

    def look(number: int) -> list[Sample] | list[str]:
        found, faults = [], []
        try:
            trajectory = source[number]
        except ValueError as error:
            return [str(error)]
        for step, at in enumerate(trajectory.steps):
            if at.verdict == "rejected" and not rules.rejected:
                continue
            try:
                layout = rules.layout(rules.inputs(trajectory, step), tokenizer)
                found.append(Sample(number, step, layout))
            except ValueError as error:
                faults.append(f"trajectory {trajectory.id}, image {step + 1}: {error}")
        return faults or found

    if not len(source):
        raise ValueError("there are no trajectories to train on")
    looked = [look(0)]  # alone: a tokenizer may be set up by its first use
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        looked += pool.map(look, range(1, len(source)))
    faults = [entry for found in looked for entry in found if isinstance(entry, str)]
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ValueError("\n".join(["unusable samples:", *faults[:_SHOWN], *more]))
    samples = [sample for found in looked for sample in found]
    if not samples:
        raise ValueError("the trajectories reject all of their pictures; nothing is left to learn")
    return samples
