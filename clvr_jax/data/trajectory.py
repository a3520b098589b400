"""The schema of a trajectory, and the conversation that it is to the vision-language model.

One record of a JSONL file:

    {"id": "jug-1", "goal": "a jug with a lid", "steps": [
      {"reasoning": "...", "action": {"kind": "generate", "prompt": "a jug"}, "image": "1.png"},
      {"reasoning": "...", "action": {"kind": "edit", "prompt": "add a lid to <IMG_GEN_1>",
       "references": [1]}, "image": "2.png"}], "closing": "The jug has its lid."}

As a conversation: the user's turn is the goal; an assistant turn reasons, acts and ends with the
marker `<IMG_GEN_n>` (its exact text: `clvr_jax.data.turns`); the user's turn after it shows image
n; the last assistant turn is the closing and the stop action. A trajectory without a closing is
unfinished: its conversation ends with the user's turn that the next assistant turn would answer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import (
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from clvr_jax.data.turns import (
    Action,
    Model,
    Number,
    Text,
    Turn,
    Words,
    explain,
    marker,
    mentioned,
    plain,
    without_action,
)

IMAGE = "<image>"

__all__ = ["IMAGE", "Action", "Message", "Picture", "Step", "Trajectory"]


class Picture(NamedTuple):
    """An image in a message.

    Attributes:
      image: what `clvr_jax.data.images.read_image` reads: a path, or a place inside a file.
      number: its number in the trajectory, counted from 1.
    """

    image: str
    number: int


class Message(NamedTuple):
    """One message of the conversation; pictures in user messages only."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Picture, ...]


class Step(Model):
    """One image and how it came about.

    Attributes:
      reasoning: why this is drawn; may name earlier images by their markers.
      action: what the image model was told; None in data that does not say.
      image: path, relative to the folder of the file that holds the record.
      observation: the user's turn that shows the image; `<image>` is its place.
      critique: what the vision-language model said when it looked at the image.
      verdict: whether it accepted the image.
      metadata: what else the maker records (seconds, tokens, evaluations, seeds, retries).
    """

    reasoning: Words
    action: Action | None = None
    image: str = Field(min_length=1)
    observation: str = IMAGE
    critique: Text | None = None
    verdict: Literal["accepted", "rejected"] | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("observation")
    @classmethod
    def _one_picture(cls, text: str) -> str:
        if text.count(IMAGE) != 1:
            raise ValueError(f"must hold {IMAGE} once, given {text!r}")
        plain(text.replace(IMAGE, ""))
        return text

    @field_validator("reasoning")
    @classmethod
    def _narrative(cls, text: str) -> str:
        return without_action(text)


class Trajectory(Model):
    """A goal and the steps taken towards it.

    Attributes:
      id: unique in its dataset.
      goal: the user's prompt.
      steps: at least one; either all have an action or none.
      closing: the last narrative; empty if the trajectory ended without one (or, with the outcome
        "stopped", by the bare action).
      system: a system message before the goal, if the data has one.
      outcome: why it ended: by the model's decision (stopped), a spent budget, a conversation that
        fills the model's context, or an error.
      final: number of the image that is the answer, where it is not the last.
      metadata: what else the maker records.
    """

    id: Words
    goal: Words
    steps: tuple[Step, ...] = Field(min_length=1, strict=False)
    closing: Text = ""
    system: Words | None = None
    outcome: (
        Literal["stopped", "generations", "seconds", "evaluations", "tokens", "context", "failed"]
        | None
    ) = None
    final: Number | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("closing")
    @classmethod
    def _narrative(cls, text: str) -> str:
        return without_action(text)

    @model_validator(mode="after")
    def _check(self) -> "Trajectory":
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        if mentioned(self.goal):
            yield f"the goal names {marker(mentioned(self.goal)[0])}, which does not exist yet"
        for number, step in enumerate(self.steps, 1):
            yield from _later(f"step {number}: the reasoning", step.reasoning, number - 1)
            if step.action is None:
                continue
            yield from _later(f"step {number}: the prompt", step.action.prompt, number - 1)
            for reference in step.action.references:
                if reference >= number:
                    yield (
                        f"step {number}: reference {reference} is a later image; "
                        + (f"1 to {number - 1} exist" if number > 1 else "none exists yet")
                    )
        yield from _later("the closing", self.closing, len(self.steps))
        without = [n for n, step in enumerate(self.steps, 1) if step.action is None]
        if 0 < len(without) < len(self.steps):
            yield f"steps {without} have no action, the others have; give all of them or none"
        if self.final is not None and self.final > len(self.steps):
            yield f"final is {self.final}, there are {len(self.steps)} images"

    @property
    def has_actions(self) -> bool:
        """Whether the steps say what the image model was told."""
        return self.steps[0].action is not None

    def messages(self) -> list[Message]:
        """Return the conversation; the assistant's messages are what is learnt."""
        messages = [Message("system", (self.system,))] if self.system else []
        messages.append(Message("user", (self.goal,)))
        for number, step in enumerate(self.steps, 1):
            turn = Turn(step.reasoning, step.action, image=number)
            before, after = step.observation.split(IMAGE)
            parts = (before, Picture(step.image, number), after)
            messages.append(Message("assistant", (turn.text(),)))
            messages.append(Message("user", tuple(part for part in parts if part)))
        if self.closing or (self.outcome == "stopped" and self.has_actions):
            turn = Turn(self.closing, stop=self.has_actions)
            messages.append(Message("assistant", (turn.text(),)))
        return messages

    def within(self, folder: str | Path) -> "Trajectory":
        """Return the trajectory with its relative image paths made absolute, below `folder`."""
        base = Path(folder).absolute()
        return self.with_images([str(base / step.image) for step in self.steps])

    def with_images(self, images: list[str]) -> "Trajectory":
        """Return the trajectory with other places for its images, one for each step."""
        steps = tuple(
            step.model_copy(update={"image": image})
            for step, image in zip(self.steps, images, strict=True)
        )
        return self.model_copy(update={"steps": steps})

    def record(self) -> dict[str, Any]:
        """Return the trajectory as JSON values; fields at their defaults are left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


def check_goal(goal: str) -> None:
    """Raise ValueError if a prompt cannot be the goal of a trajectory; it says why."""
    try:
        TypeAdapter(Words).validate_python(goal)
    except ValidationError as error:
        raise ValueError(f"the prompt {goal!r} {'; '.join(explain(error))}") from None
    if mentioned(goal):
        raise ValueError(f"the prompt {goal!r} names an image; none exists yet")


def _later(what: str, text: str, exist: int) -> Iterator[str]:
    for number in mentioned(text):
        if not 1 <= number <= exist:
            yield f"{what} names {marker(number)}; " + (
                f"1 to {exist} exist" if exist else "no image exists yet"
            )
