"""Which parameters are trained, and how the rest is kept."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from clvr_jax import lora, tree
from clvr_jax.train.step import Settings
from clvr_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is trained of a model.

    Attributes:
      pattern: parameters that are trained, where there are no adapters.
      rank: of the adapters, 0 for none; with adapters nothing else is trained.
      alpha: adapters count alpha / rank times; 0 for once.
      adapted: pattern of the kernels with an adapter.
    """

    pattern: str = ".*"
    rank: int = 0
    alpha: float = 0.0
    adapted: str = ""

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by."""
        return self.alpha / self.rank if self.rank and self.alpha else 1.0

    @property
    def share(self) -> float:
        """Part of the weights with a gradient, for FLOPs: none under adapters, else all."""
        return 0.0 if self.rank else 1.0

    def split(self, abstract: Params) -> tuple[Params, Params]:
        """Return (trained, frozen) parameters of the model; all are frozen under adapters.

        Raises:
          ValueError: the pattern matches nothing.
        """
        flat = tree.flatten(abstract)
        if self.rank:
            return {}, abstract
        chosen, rest = tree.partition(flat, self.pattern)
        if not chosen:
            raise ValueError(f"train is {self.pattern!r}, which matches none of {', '.join(flat)}")
        return tree.unflatten(chosen), tree.unflatten(rest)

    def typed(self, abstract: Params, settings: Settings) -> Params:
        """Return the model's shapes in the types in which training keeps them."""
        trained = tree.flatten(self.split(abstract)[0])
        kind = lambda path: settings.param_dtype if path in trained else settings.compute_dtype
        return tree.unflatten(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, kind(path))
                for path, leaf in tree.flatten(abstract).items()
            }
        )

    def state_params(
        self, params: Params, stacked: tuple[str, ...], key: Any, dtype: Any
    ) -> tuple[Params, Params]:
        """Return (trained, frozen) as `TrainState.params` and the step's `frozen["model"]`.

        Works on shapes as on arrays; new adapters are drawn from `key`.
        """
        trained, frozen = self.split(params)
        if not self.rank:
            return {"model": trained}, frozen
        adapters = lora.init(key, params, self.adapted, self.rank, stacked, jnp.dtype(dtype))
        return {"lora": adapters}, frozen

    def trains(self, abstract: Params, root: str) -> bool:
        """Whether anything of a subtree of the model has a gradient."""
        paths = [path for path in tree.flatten(abstract) if path.startswith(root + "/")]
        if self.rank:
            kernels = (path for path in paths if path.endswith("kernel"))
            return any(re.search(self.adapted, path) for path in kernels)
        return any(re.search(self.pattern, path) for path in paths)


def selection(config: Any) -> Selection:
    """Return the selection of a config.

    Raises:
      ValueError: a number is negative, or an option would have no effect.
    """
    given = config.lora
    if given.rank and config.train != ".*":
        raise ValueError(
            f"train is {config.train!r} and lora.rank {given.rank}: beside adapters nothing else "
            "is trained; choose what is adapted with lora.pattern"
        )
    if given.alpha and not given.rank:
        raise ValueError(f"lora.alpha is {given.alpha} without adapters; give lora.rank as well")
    if given.rank < 0 or given.alpha < 0:
        raise ValueError(f"lora.rank {given.rank} and lora.alpha {given.alpha}: not negative")
    return Selection(config.train, given.rank, given.alpha, given.pattern)
