"""One training step as a pure function: gradients over micro-batches, update, average, guard."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clvr_jax import tree
from clvr_jax.train import rounding
from clvr_jax.train.state import TrainState
from clvr_jax.typing import Params, PRNGKey

Batch = Mapping[str, Any]
# (params, adapters, others, batch, key, static) -> (sum of weighted losses, sum of weights, aux)
Loss = Callable[..., tuple[Any, Any, Mapping[str, Any]]]

PRECISIONS = ("float32", "mixed", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a step computes.

    Attributes:
      precision: float32; mixed (float32 masters, bfloat16 compute); bfloat16 (parameters in
        bfloat16, updated with stochastic rounding).
      ema: decay of the moving average, 0 for none. It begins at 1/10 and rises to this, as
        min(ema, (1 + n) / (10 + n)) after n steps.
    """

    precision: str = "mixed"
    ema: float = 0.0

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}; choose from {', '.join(PRECISIONS)}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be at least 0 and below 1")

    @property
    def compute_dtype(self) -> Any:
        """Type in which networks run, and of frozen parameters."""
        return jnp.float32 if self.precision == "float32" else jnp.bfloat16

    def cast(self, params: Params) -> Params:
        """Return parameters in the type in which networks run."""
        return jax.tree.map(lambda x: x.astype(self.compute_dtype), params)

    @property
    def param_dtype(self) -> Any:
        """Type in which trained parameters are kept."""
        return jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    settings: Settings,
    schedule: Callable[[Any], Any],
    places: Params | None = None,
) -> Callable[[TrainState, Params, Batch, PRNGKey, Hashable], tuple[TrainState, dict[str, Any]]]:
    """Return train_step(state, frozen, batch, key, static) -> (state, metrics), not yet compiled.

    The loss of a step is one mean over all its rows: sums of losses and of weights are added up
    over micro-batches and devices, then divided once.

    Args:
      loss: `loss(params, adapters, others, batch, key, static)` of one micro-batch, returns
        (sum of weighted losses, sum of weights, aux); an aux value is a sum over the same weights,
        or a pair (sum, its own weight).
      tx: the optimiser.
      settings: precision and average.
      schedule: the learning rate that `tx` uses, for the report.
      places: shardings of the trained parameters; gradients are kept there.

    The step's `frozen` is {"model": frozen parameters of the trained model, "others": {...}}; the
    batch has leaves (accumulation, rows, ...). Metrics are pairs (sum, weight), except `norms`,
    the squared gradient norm of every parameter. A step whose loss or gradients are not finite
    changes nothing but its number, and says so in `metrics["finite"]`.
    """

    def micro(compute, frozen, batch, key, static):
        params, adapters = joined(compute, frozen["model"])
        total, weight, aux = loss(params, adapters, frozen["others"], batch, key, static)
        return total.astype(jnp.float32), (weight.astype(jnp.float32), dict(aux))

    gradient = jax.value_and_grad(micro, has_aux=True)

    def train_step(state, frozen, batch, key, static):
        key = jax.random.fold_in(key, state.step)
        weights = settings.cast(state.params), frozen
        part = lambda weights, batch, key: gradient(*weights, batch, key, static)
        total, weight, aux, grads = _accumulate(part, weights, batch, key, places)
        share = 1 / jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * share, grads)
        norms = {path: jnp.sum(g**2) for path, g in tree.flatten(grads).items()}
        norm = jnp.sqrt(sum(norms.values()))
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        wide = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
        updates, opt_state = tx.update(grads, state.opt_state, wide)
        params = optax.apply_updates(wide, updates)
        if settings.precision == "bfloat16":
            params = rounding.tree_stochastic(params, jax.random.fold_in(key, 2**31 - 1))
        ema = state.ema
        if ema is not None:
            n = state.step.astype(jnp.float32)
            decay = jnp.minimum(settings.ema, (1 + n) / (10 + n))
            ema = jax.tree.map(
                lambda old, new: old + (1 - decay) * (new.astype(jnp.float32) - old), ema, params
            )
        new = (params, opt_state, ema)
        old = (state.params, state.opt_state, state.ema)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        one = jnp.ones((), jnp.float32)
        metrics = {
            "loss": (total, weight),
            "grad_norm": (norm, one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
            **{name: _pair(value, weight) for name, value in aux.items()},
        }
        state = TrainState(state.step + 1, *new)
        return state, {"finite": finite, "norms": norms, "metrics": metrics}

    return train_step


def joined(trained: Params, frozen: Params) -> tuple[Params, Params]:
    """Return (all parameters of the model, its adapters or {}).

    Args:
      trained: as `TrainState.params`.
      frozen: the model's other parameters.
    """
    whole = {**tree.flatten(frozen), **tree.flatten(trained.get("model", {}))}
    return tree.unflatten(whole), trained.get("lora", {})


def _accumulate(gradient, weights, batch: Batch, key: PRNGKey, places):
    """Sums of losses, weights, aux and gradients over micro-batches."""
    count = jax.tree.leaves(batch)[0].shape[0]

    def one(i, weights, part):
        (total, (weight, aux)), grads = gradient(weights, part, jax.random.fold_in(key, i))
        aux = {name: _pair(value, weight) for name, value in aux.items()}
        if places is not None:
            grads = jax.lax.with_sharding_constraint(grads, places)
        return total, weight, aux, grads

    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return one(0, weights, first)

    def body(sums, at):
        # else XLA gathers embeddings and output head before the loop, and keeps them through it
        more = one(at[0], *jax.lax.optimization_barrier((weights, at[1])))
        # micro-batches add up in float32, whatever the networks compute in
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, more), None

    shapes = jax.eval_shape(one, 0, weights, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    if places is not None:
        zeros = (*zeros[:3], jax.lax.with_sharding_constraint(zeros[3], places))
    sums, _ = jax.lax.scan(body, zeros, (jnp.arange(count), batch))
    return sums


def _pair(value, weight):
    if isinstance(value, tuple):
        return tuple(jnp.asarray(part, jnp.float32) for part in value)
    return jnp.asarray(value, jnp.float32), weight


def compiled(train_step, places: Any = None) -> Any:
    """Return the step compiled with its state donated; `places` are the state's shardings."""
    out = None if places is None else (places, None)
    return jax.jit(train_step, static_argnums=4, donate_argnums=0, out_shardings=out)


def not_finite(norms: Mapping[str, Any]) -> list[str]:
    """Return the parameters whose gradients are not finite, from a step's `norms`."""
    return [path for path, norm in norms.items() if not jnp.isfinite(norm)]
