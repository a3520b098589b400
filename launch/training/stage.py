"""What a training stage is to the command that runs it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clvr_jax.data.plan import Epochs, Step
from clvr_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows of one dataset, planned.

    Attributes:
      path: as given.
      records: trajectories.
      fingerprint: of their content.
      steps: the plan: of the whole run, or of one epoch of validation.
      make: a step's arrays of this process.
      counts: real rows of a step by unit.
      flops: model FLOPs of a step.
      describe: a step's first row in words.
    """

    path: str
    records: int
    fingerprint: str
    steps: Epochs
    make: Callable[[Step], Mapping[str, Any]]
    counts: Callable[[Step], Mapping[str, float]]
    flops: Callable[[Step], float]
    describe: Callable[[Step], str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the paper's stages, bound to a config.

    Attributes:
      name: image or vlm.
      component: name of the model that is trained, as checkpoints call it.
      abstract: its parameters as shapes, float32.
      stacked: its stacked roots.
      others: frozen models as shapes, float32, by name.
      loss: by the trainer's contract.
      open: returns the sources of the weights by name, `component` and each of `others`; raises
        where the weights are not at hand.
      constants: further entries of the frozen dict that are no model: name to array.
      record: what is recorded with the weights: how their inputs are made.
    """

    name: str
    component: str
    abstract: Params
    stacked: tuple[str, ...]
    others: Mapping[str, Params]
    loss: Callable[..., Any]
    open: Callable[[], Mapping[str, Any]]
    constants: Mapping[str, Any]
    record: Mapping[str, Any]


def require_sizes(config: Any, what: str, found: str) -> None:
    """Compare the sizes of weights with those that a config expects, if it does.

    Raises:
      ValueError: they differ.
    """
    if config.sizes and found != config.sizes:
        raise ValueError(
            f"{config.weights} holds a {what} of sizes {found!r}, the config says "
            f"{config.sizes!r}; give --config.sizes={found} or other weights"
        )
