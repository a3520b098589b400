"""What training changes, and where its parts lie on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from clvr_jax import tree
from clvr_jax.typing import Params


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes again; what is frozen is not in it.

    Attributes:
      step: steps done; with the run's seed it is all that random draws depend on.
      params: what is trained: `{"model": {...}, "lora": {...}}`, either may be absent.
      opt_state: the optimiser's.
      ema: moving average of `params` in float32, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def averaged(self) -> Any:
        """The moving average where there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


def create(params: Params, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """Return the state before the first step; the optimiser's begins in float32."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(wide),
        # a copy even where the type is the same: both are donated
        ema=jax.tree.map(jnp.copy, wide) if ema else None,
    )


def abstract(params: Params, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """Return the state of these parameters (or their shapes) as shapes."""
    return jax.eval_shape(lambda params: create(params, tx, ema), params)


def shardings(state: TrainState, places: Params) -> TrainState:
    """Return a sharding for every leaf of a state.

    Args:
      state: the state, or its shapes.
      places: sharding of every trained parameter. Moments and averages lie with their parameter:
        a leaf belongs to the parameter whose path its own path ends with, if the shapes agree.
    """
    flat = tree.flatten(places)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(state.params).items()}
    mesh = next(iter(flat.values())).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        for start in range(len(names)):
            own = "/".join(names[start:])
            if own in flat and shapes[own] == leaf.shape:
                return flat[own]
        if leaf.ndim:
            raise ValueError(
                f"the state's {jax.tree_util.keystr(path)} {leaf.shape} belongs to no parameter"
            )
        return everywhere

    return jax.tree_util.tree_map_with_path(place, state)


def initialise(
    params: Params, tx: optax.GradientTransformation, ema: bool = False, places: Any = None
) -> TrainState:
    """Return the first state; on a mesh every leaf is made where it lies. Frees `params`.

    Args:
      params: parameters to train, already on their devices.
      tx: the optimiser.
      ema: whether to keep a moving average.
      places: sharding of every parameter, None on one device.
    """
    make = lambda params: create(params, tx, ema)
    out = None if places is None else shardings(abstract(params, tx, ema), places)
    return jax.jit(make, out_shardings=out, donate_argnums=0)(params)
