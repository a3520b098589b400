"""What the image model is given for one step of a trajectory: a text and earlier images.

The same function serves training, inference and the data engine, so that a model is asked as it
was taught. Its policy is recorded with the weights.

The text of a `trajectory` policy is the paper's context (equation 1) without its images: the goal,
then the reasoning of every step up to this one, as paragraphs. An image that is given as reference
i (from 0, at T = 10 + 10 i) is called by its place among the references, "image 1" for the first:
where a narrative or prompt names it by its marker, and, as the last line of its step's paragraph,
where it was drawn. Images that are not given are called "an earlier image", and not mentioned
where they were drawn.

    a jug with a lid

    I begin with the jug.
    image 1

    image 1 lacks its lid, so I add one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.data.turns import MARKER, Model, explain, marker

BUCKETS = (512, 1024, 2048)


class Condition(NamedTuple):
    """What the image model is given besides noise.

    Attributes:
      text: the prompt, before any chat template.
      references: numbers of earlier images, counted from 0, in the order in which they are given.
    """

    text: str
    references: tuple[int, ...]


class Policy(Model):
    """How a condition is made; part of what weights were trained with.

    Attributes:
      text: the goal and all reasoning so far (trajectory), or the action's prompt alone
        (instruction; the goal where a step has no action).
      references: all earlier images, those that the action chose (chosen), or the last few.
      last_k: how many, for last_k.
      name: what the image given at place {i}, counted from 1, is called in the text.
      absent: what an earlier image that is not given is called.
      buckets: lengths to which texts are padded, in tokens. klein sees its padding, so that the
        length is part of the condition.
    """

    text: Literal["trajectory", "instruction"] = "trajectory"
    references: Literal["all", "chosen", "last_k"] = "all"
    last_k: int | None = Field(default=None, ge=1)
    name: str = "image {i}"
    absent: str = "an earlier image"
    buckets: tuple[int, ...] = Field(default=BUCKETS, min_length=1, strict=False)

    @model_validator(mode="after")
    def _check(self) -> "Policy":
        if (self.references == "last_k") != (self.last_k is not None):
            raise ValueError(
                f"references is {self.references} and last_k is {self.last_k}; last_k is a number "
                "if references is last_k, and None otherwise"
            )
        if self.name.count("{i}") != 1:
            raise ValueError(f"name is {self.name!r}; it must hold {{i}}, the image's place, once")
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets are {self.buckets}; they must be positive and ascend")
        return self

    def bucket(self, tokens: int) -> int:
        """Return the length to which a text of `tokens` tokens (template included) is padded.

        Raises:
          ValueError: it is longer than the largest; nothing is cut.
        """
        for length in self.buckets:
            if tokens <= length:
                return length
        raise ValueError(
            f"the condition's text takes {tokens} tokens, at most {self.buckets[-1]} are allowed; "
            "shorten the reasoning, use text=instruction, or add a bucket to the policy"
        )

    def to_json(self) -> str:
        """Return the policy as JSON, every field written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @classmethod
    def from_json(cls, given: str | Mapping[str, Any]) -> "Policy":
        """Return the policy of a JSON text or of its fields; those left out are at their defaults.

        Raises:
          ValueError: a field is unknown or has no such value.
        """
        fields = json.loads(given) if isinstance(given, str) else dict(given)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"the conditioning policy {'; '.join(explain(error))}") from error


def condition(trajectory: Trajectory, step_index: int, policy: Policy) -> Condition:
    """Return the condition under which image `step_index`, counted from 0, is drawn.

    Raises:
      IndexError: there is no such step.
      ValueError: see `condition_next`.
    """
    if not 0 <= step_index < len(trajectory.steps):
        raise IndexError(f"step {step_index} of {len(trajectory.steps)}, counted from 0")
    step = trajectory.steps[step_index]
    earlier = trajectory.steps[:step_index]
    return condition_next(trajectory.goal, earlier, step.reasoning, step.action, policy)


def condition_next(
    goal: str, earlier: Sequence[Step], reasoning: str, action: Action | None, policy: Policy
) -> Condition:
    """Return the condition under which the image that follows `earlier` is drawn.

    Args:
      goal: the user's prompt.
      earlier: the steps whose images exist.
      reasoning: why the next image is drawn.
      action: what was decided for it, where there are actions.
      policy: how the condition is made.

    Raises:
      ValueError: the policy needs an action and there is none; a text or an action names an image
        that does not exist.
    """
    count = len(earlier)
    references = _references(count, action, policy)
    places = {number: place for place, number in enumerate(references, 1)}

    def call(match: re.Match) -> str:
        number = int(match[1])
        if not 1 <= number <= count:
            raise ValueError(
                f"the text for image {count + 1} names {match[0]}; "
                + (f"1 to {count} exist" if count else "no image exists yet")
            )
        place = places.get(number - 1)
        return policy.absent if place is None else policy.name.replace("{i}", str(place))

    if policy.text == "instruction":
        text = goal if action is None else action.prompt
        return Condition(MARKER.sub(call, text), references)
    parts = [goal]
    for index, step in enumerate(earlier):
        drawn = f"\n{marker(index + 1)}" if index in places else ""
        parts.append(step.reasoning + drawn)
    return Condition(MARKER.sub(call, "\n\n".join([*parts, reasoning])), references)


def _references(count: int, action: Action | None, policy: Policy) -> tuple[int, ...]:
    if policy.references == "all":
        return tuple(range(count))
    if policy.references == "last_k":
        return tuple(range(count))[-policy.last_k :]
    if action is None:
        raise ValueError(
            "references=chosen takes the references of actions, and the step has no action; "
            "use references=all or last_k with this data"
        )
    for number in action.references:
        if number > count:
            raise ValueError(
                f"the action for image {count + 1} refers to image {number}; "
                + (f"1 to {count} exist" if count else "no image exists yet")
            )
    return tuple(number - 1 for number in action.references)
