"""The folder of a training run seen as weights: what it trained, over the weights it began from."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.tree import flatten, unflatten
from clvr_jax.weights import WeightsError
from conversion.components import Component
from conversion.lazy import Lazy, Stored
from conversion.sources import Source

RECORD, CHECKPOINTS = "run.json", "checkpoints"


@dataclasses.dataclass(frozen=True)
class Place:
    """A checkpoint of a run.

    Attributes:
      folder: of the run.
      step: which checkpoint, None for the newest.
    """

    folder: Path
    step: int | None

    def record(self) -> dict[str, Any]:
        """Return what the run recorded.

        Raises:
          ValueError: it cannot be read.
        """
        file = self.folder / RECORD
        try:
            values = json.loads(file.read_text())
            return {**values, "component": values["component"], "weights": values["weights"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no record of a run: {error!r}") from error

    def checkpoints(self) -> Any:
        """Return the folder of its states: its own, or that which it recorded."""
        own = self.folder / CHECKPOINTS
        return own if own.is_dir() else self.record().get("checkpoints") or own

    def newest(self) -> int:
        """Return the step of its newest checkpoint.

        Raises:
          CheckpointError: it has none.
        """
        from clvr_jax.checkpoint import CheckpointError, saved_steps

        steps = saved_steps(self.checkpoints())
        if not steps:
            raise CheckpointError(f"{self.checkpoints()} holds no finished checkpoint")
        return steps[-1]


def place(path: Path) -> Place | None:
    """Return the checkpoint at a run's folder, or at checkpoints/STEP in it; None elsewhere."""
    if (path / RECORD).exists():
        return Place(path, None)
    if path.parent.name == CHECKPOINTS and (path.parents[1] / RECORD).exists():
        return Place(path.parents[1], int(path.name)) if path.name.isdigit() else None
    return None


def names(record: Mapping[str, Any]) -> list[str]:
    """Return the components that a run trained, from its record."""
    return record["component"].split("+")


def component(base: Component, at: Place) -> Component:
    """Return the trained component over the one that training began from."""
    return dataclasses.replace(base, layout="run", path=at.folder, base=base, step=at.step)


class RunSource:
    """A run's parameters: the moving average where it keeps one, adapters merged.

    Args:
      trained: the component, see `component`.
      base: its base's checkpoint.

    Raises:
      CheckpointError, WeightsError: the run has no checkpoint of that step, or it is damaged.
    """

    def __init__(self, trained: Component, base: Source):
        from clvr_jax.checkpoint import open_state
        from conversion.lora.merged import MergedSource

        self.path, self.base = trained.path, base
        at = Place(trained.path, trained.step)
        record = at.record()
        self.reader = open_state(at.checkpoints(), trained.step)
        # several components that were trained together have a root each
        own = f"{trained.name}/" if len(names(record)) > 1 else ""
        self._prefix = prefix = f"{_root(self.reader)}/model/{own}"
        self.trained = {
            name.removeprefix(prefix): spec
            for name, spec in self.reader.specs.items()
            if name.startswith(prefix)
        }
        self._layers: Source = _Over(self)
        if factors := _adapters(self.reader, record):
            self._layers = MergedSource(self._layers, factors)

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        return self._layers.read(path, layer)

    def non_finite(self, path: str, layer: int | None) -> Exception:
        """Return the error that names a leaf with non-finite values; see `Source`."""
        return self._layers.non_finite(path, layer)

    def release(self) -> None:
        """Give back the memory of what was read."""
        self.base.release()

    def close(self) -> None:
        """Close the base's files."""
        self.base.close()

    def own(self, path: str, layer: int | None) -> Stored:
        """Return a trained leaf, stacked ones layer by layer."""
        name, (shape, dtype) = f"{self._prefix}{path}", self.trained[path]
        if layer is None:
            return Stored(shape, dtype, lambda index: self.reader.read(name, index))

        def read(index: Any) -> np.ndarray:
            rest = index or (slice(None),) * (len(shape) - 1)
            return self.reader.read(name, (slice(layer, layer + 1), *rest))[0]

        return Stored(shape[1:], dtype, read)


def adapters(at: Place) -> dict[str, Any]:
    """Return the adapters that a run trained, in float32, with their scale in `b`.

    Raises:
      CheckpointError, WeightsError: the run has no checkpoint of that step, or it is damaged.
      ValueError: it trained no adapters.
    """
    from clvr_jax.checkpoint import open_state

    found = _adapters(open_state(at.checkpoints(), at.step), at.record())
    if not found:
        raise ValueError(
            f"{at.folder} trained the weights themselves, not adapters; convert it as a model: "
            f"python -m conversion {at.folder} TARGET"
        )
    return found


def _adapters(reader: Any, record: dict[str, Any]) -> dict[str, Any]:
    prefix, scale = f"{_root(reader)}/lora/", np.float32(record.get("adapter_scale", 1.0))
    flat = {}
    for name in reader.specs:
        if name.startswith(prefix):
            factor = scale if name.endswith("/b") else np.float32(1)
            flat[name.removeprefix(prefix)] = reader.read(name).astype(np.float32) * factor
    return unflatten(flat)


def _root(reader: Any) -> str:
    """Where a state has what it is used as: its moving average, if it keeps one."""
    return "ema" if any(name.startswith("ema/") for name in reader.specs) else "params"


class _Over:
    """A run's trained leaves over its base's, without adapters."""

    def __init__(self, run: RunSource):
        self._run, self.path = run, run.path

    def read(self, path: str, layer: int | None) -> Lazy:
        run = self._run
        return run.own(path, layer) if path in run.trained else run.base.read(path, layer)

    def non_finite(self, path: str, layer: int | None) -> Exception:
        if path not in self._run.trained:
            return self._run.base.non_finite(path, layer)
        name = path if layer is None else f"{path}, layer {layer}"
        return WeightsError(self.path, name, "values that are not finite", "finite values")

    def release(self) -> None:
        self._run.release()

    def close(self) -> None:
        self._run.close()


def differences(trained: Component, source: RunSource) -> list[str]:
    """Return a line for each trained leaf that is not one of the model's."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(trained.abstract()).items()}
    return [
        f"{trained.path}: {path} {spec[0]}, the model has {shapes.get(path, 'no such leaf')}"
        for path, spec in source.trained.items()
        if shapes.get(path) != tuple(spec[0])
    ]
