"""The optimiser as a chain of optax transformations, built from settings.

In order: clip by the global norm, AdamW, Muon or SGD, decoupled weight decay (Loshchilov and Hutter
2019, arXiv 1711.05101), schedule, factors of parameter groups.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from clvr_jax import tree
from clvr_jax.train import rounding
from clvr_jax.typing import Params

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "muon", "sgd")
MOMENTS = ("float32", "bfloat16")
_ADAM_RMS = 0.2  # of an entry of Adam's update in units of the learning rate, as a rule


@dataclasses.dataclass(frozen=True)
class Optim:
    """How parameters are updated.

    Attributes:
      name: adamw, muon or sgd. Muon (Jordan 2024) makes the update of every kernel orthogonal, at
        the size that Adam's has (Liu et al. 2025, arXiv 2502.16982), so that rates carry over;
        what is no kernel gets AdamW's.
      learning_rate: highest value of the schedule.
      schedule: constant, cosine or linear, behind the warm-up.
      warmup: steps, or a share of all steps below 1; the first step has 1/warmup of the rate.
      end: where cosine and linear end, as a share of the rate.
      momentum: AdamW's b1 and b2; SGD and Muon take the first as momentum.
      eps: AdamW's epsilon.
      weight_decay: factor of the decay.
      decay: pattern of the parameters that decay; norms and biases do not.
      clip_norm: largest global gradient norm; 0 for none.
      groups: (pattern, factor of the rate) pairs; first match wins, others have factor 1. Patterns
        are searched in a model's own paths, without the root `model/` or `lora/` of the state.
      moments: float32, or bfloat16 with stochastic rounding.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup: float = 0.0
    end: float = 0.0
    momentum: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = r"(kernel|embedding|/a|/b)$"
    clip_norm: float = 1.0
    groups: tuple[tuple[str, float], ...] = ()
    moments: str = "float32"

    def __post_init__(self):
        for name, value, known in (
            ("name", self.name, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("moments", self.moments, MOMENTS),
        ):
            if value not in known:
                raise ValueError(f"optim.{name} is {value!r}; choose from {', '.join(known)}")
        for name in ("learning_rate", "warmup", "end", "weight_decay", "clip_norm", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must not be negative")
        for pattern, factor in self.groups:
            if factor <= 0:
                raise ValueError(
                    f"optim.groups gives {pattern!r} the factor {factor}; factors are positive. "
                    "Leave parameters out with the pattern of what is trained"
                )


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Return the learning rate of every step from 0 to `steps` - 1.

    Raises:
      ValueError: the warm-up is longer than the training.
    """
    warmup = optim.warmup * steps if optim.warmup < 1 else optim.warmup
    warmup = round(warmup)
    if warmup > steps:
        raise ValueError(f"optim.warmup is {warmup} steps, the whole training has {steps}")
    low, rest = optim.end, max(steps - warmup, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        fall = {
            "constant": jnp.ones(()),
            "cosine": low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - (1 - low) * done,
        }[optim.schedule]
        return optim.learning_rate * jnp.where(step < warmup, rise, fall)

    return rate


def make(
    optim: Optim, params: Params, steps: int, stacked: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Return the chain for parameters of these paths.

    Args:
      optim: settings.
      params: what is trained, or its shapes.
      steps: length of the whole training.
      stacked: roots of the model whose leaves have layers as their first axis; Muon wants to know
        which axes are a matrix.

    Raises:
      ValueError: a group's pattern matches no parameter, or the warm-up is too long.
    """
    paths = list(tree.flatten(params))
    for pattern, _ in optim.groups:
        if not any(re.search(pattern, _own(path)) for path in paths):
            raise ValueError(
                f"optim.groups: {pattern!r} matches none of {', '.join(map(_own, paths))}"
            )
    b1, b2 = optim.momentum
    if optim.name == "adamw":
        inner = optax.scale_by_adam(b1, b2, optim.eps)
    elif optim.name == "muon":
        inner = _muon(optim, params, stacked)
    else:
        inner = optax.trace(b1) if b1 else optax.identity()
    if optim.moments == "bfloat16":
        inner = rounding.kept_in_bfloat16(inner)
    chain = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    chain.append(inner)
    if optim.weight_decay:
        decays = lambda params: _by_path(params, lambda p: bool(re.search(optim.decay, p)))
        chain.append(optax.add_decayed_weights(optim.weight_decay, mask=decays))
    chain.append(optax.scale_by_learning_rate(schedule(optim, steps)))
    if optim.groups:
        chain.append(_factors(optim.groups))
    return optax.chain(*chain)


def _muon(optim: Optim, params: Params, stacked: Sequence[str]) -> optax.GradientTransformation:
    """Orthogonal updates of kernels, Adam's of all else."""
    axes = {path: _matrix(path, leaf.shape, stacked) for path, leaf in tree.flatten(params).items()}
    b1, b2 = optim.momentum
    kernels = optax.chain(
        optax.trace(b1, nesterov=True),
        optax.stateless(lambda updates, params: _orthogonal(updates, axes, optim.eps)),
    )
    labels = tree.unflatten({path: "muon" if each else "adamw" for path, each in axes.items()})
    adamw = optax.scale_by_adam(b1, b2, optim.eps)
    return optax.partition({"muon": kernels, "adamw": adamw}, labels)


def _matrix(
    path: str, shape: Sequence[int], stacked: Sequence[str]
) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are its inputs and outputs; None for what is none.

    Layers stand in front, a kernel each. Then a `Linear` has one axis of inputs, and all others are
    outputs (heads, and what is fused); a `Conv` has its window and channels before the outputs.
    """
    layers = int(any(_own(path).startswith(f"{root}/") for root in stacked))
    inputs = 3 if len(shape) == 4 and not layers and shape[0] == shape[1] else 1
    if not path.endswith("kernel") or len(shape) - layers - inputs < 1:
        return None
    axes = range(layers, len(shape))
    return optax.contrib.MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))


def _orthogonal(updates: Params, axes: Mapping[str, Any], eps: float) -> Params:
    """Matrices with all singular values near 1, times what gives entries Adam's size."""
    flat = tree.flatten(updates)
    matrices = {path: flat[path] for path, each in axes.items() if each}
    # without momentum of its own it is the Newton-Schulz iteration alone
    muon = optax.contrib.scale_by_muon(
        beta=0.0,
        eps=eps,
        nesterov=False,
        weight_dimension_numbers={path: axes[path] for path in matrices},
    )
    matrices, _ = muon.update(matrices, muon.init(matrices))

    def scaled(path: str, value: jax.Array) -> jax.Array:
        sides = (axes[path].reduction_axis, axes[path].output_axis)
        larger = max(math.prod(value.shape[axis] for axis in side) for side in sides)
        return value * (_ADAM_RMS * math.sqrt(larger))

    done = {path: scaled(path, value) for path, value in matrices.items()}
    return tree.unflatten({**flat, **done})  # what else is there are optax's blanks


def factor_of(groups: tuple[tuple[str, float], ...], path: str) -> float:
    """Return the learning rate's factor of a parameter."""
    found = (factor for pattern, factor in groups if re.search(pattern, _own(path)))
    return next(found, 1.0)


def _own(path: str) -> str:
    """A parameter's path in its model, as the pattern of what is trained sees it."""
    return re.sub(r"^(model|lora)/", "", path)


def _factors(groups) -> optax.GradientTransformation:
    def update(updates, params=None):
        factors = _by_path(updates, lambda path: factor_of(groups, path))
        return jax.tree.map(lambda u, factor: u * factor, updates, factors)

    return optax.stateless(update)


def _by_path(params: Params, value: Any) -> Params:
    return tree.unflatten({path: value(path) for path in tree.flatten(params)})
