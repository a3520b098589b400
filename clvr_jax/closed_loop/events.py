"""What a loop tells while it works."""

import dataclasses
from collections.abc import Callable

from PIL import Image

from clvr_jax.closed_loop.result import Result
from clvr_jax.data.turns import Action


@dataclasses.dataclass(frozen=True)
class Said:
    """A piece of the turn that the vision-language model is writing."""

    task: str
    text: str


@dataclasses.dataclass(frozen=True)
class Acted:
    """A turn is over: why and what is done next, None for stopping."""

    task: str
    step: int
    reasoning: str
    action: Action | None


@dataclasses.dataclass(frozen=True)
class Drew:
    """A picture is there."""

    task: str
    step: int
    picture: Image.Image
    seconds: float
    evaluations: int


@dataclasses.dataclass(frozen=True)
class Retried:
    """Something failed and is tried again."""

    task: str
    step: int
    why: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """The task is over."""

    task: str
    result: Result


Event = Said | Acted | Drew | Retried | Ended
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take no notice of an event."""
