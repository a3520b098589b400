"""The states of a training run: saved beside the training, kept by rule, restored on any mesh.

A save is written under a temporary name and renamed when it is whole, so what is listed is
complete; what a killed process left is removed by the next start.
"""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clvr_jax.checkpoint.params import ParamsReader
from clvr_jax.weights import WeightsError

STATE, META = "state", "meta"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the text says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when newer ones come; a checkpoint stays if any rule keeps it.

    Attributes:
      last: the newest so many; at least 1.
      every: all whose step is a multiple of this; 0 for none.
      best: the so many with the lowest `metric`; 0 for none.
      metric: name of the metric given to `Checkpoints.save`.
    """

    last: int = 2
    every: int = 0
    best: int = 0
    metric: str = "loss"

    def __post_init__(self):
        if self.last < 1 or self.every < 0 or self.best < 0:
            raise ValueError(f"{self}: last must be 1 or more, every and best 0 or more")


class Checkpoints:
    """The checkpoints of one run; in a cluster every process makes one and calls it alike.

    Args:
      folder: where they are, local or an object store (gs://...); made if absent.
      keep: which stay.
    """

    def __init__(self, folder: Any, keep: Keep | None = None):
        import orbax.checkpoint as ocp

        self.keep, self.folder = keep or Keep(), _absolute(folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_policy(self.keep),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a save and return as soon as the arrays are copied from the devices.

        Args:
          step: steps done.
          state: a dict of trees of arrays, however they are sharded.
          meta: values for JSON: what else a resumed run needs.
          metrics: for `Keep.best`.

        Raises:
          CheckpointError: the disk has too little room, this save failed, or the one before it,
            after which this one was not tried; `wait` first tells the two apart.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._check_room(state)
        items = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(dict(state)), META: ocp.args.JsonSave(dict(meta))}
        )
        given = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        try:
            self._manager.save(step, args=items, metrics=given or None, force=True)
        except Exception as error:  # Orbax and TensorStore raise several kinds for a bad disk
            raise CheckpointError(f"{self.folder}: saving step {step} failed: {error}") from error

    def wait(self) -> None:
        """Return when the last save is on the disk.

        Raises:
          CheckpointError: it failed; earlier checkpoints are as they were.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the writing thread met: it is not raised anew
            self._tidy()
            raise CheckpointError(
                f"{self.folder}: the last save failed: {error}; what was saved before is whole"
            ) from error

    def meta(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """Return (step, meta) of a checkpoint, the newest by default.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        import orbax.checkpoint as ocp

        step = self._found(step)
        items = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
        return step, self._restore(step, items)[META]

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a checkpoint as `abstract` asks for it.

        Args:
          step: one of `steps()`.
          abstract: the saved dict's trees as `jax.ShapeDtypeStruct`; their `sharding` may be of any
            mesh and number of devices.

        Raises:
          CheckpointError: it cannot be read, or holds a tree of other names or shapes.
        """
        import orbax.checkpoint as ocp

        step = self._found(step)
        self._compare(step, abstract)
        items = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(dict(abstract))})
        return self._restore(step, items)[STATE]

    def close(self) -> None:
        """Finish the last save and stop the threads.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _tidy(self) -> None:
        """Remove what a failed save left: it takes the room that the next one needs."""
        if jax.process_index() == 0 and "://" not in str(self.folder):
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _found(self, step: int | None) -> int:
        self.wait()
        return _chosen(self.folder, self.steps(), step)

    def _restore(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise several kinds for broken files
            raise self._broken(step, error) from error

    def _broken(self, step: int, error: Exception) -> CheckpointError:
        others = [str(other) for other in self.steps() if other != step]
        advice = "there is no other"
        if others:
            advice = (
                f"take another one: {', '.join(others)} (a run resumes from the newest: remove "
            )
            advice += "this one to go on from the one before)"
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return CheckpointError(f"{self.folder / str(step)} cannot be read ({text}); {advice}")

    def _compare(self, step: int, abstract: Mapping[str, Any]) -> None:
        if "://" in str(self.folder):
            return  # names and shapes are read from a disk; Orbax tells of differences in its way
        try:
            saved = {name: shape for name, (shape, _) in _reader(self.folder, step).specs.items()}
        except WeightsError as error:
            raise self._broken(step, error) from error
        asked = _named(abstract)
        lines = [f"missing: {name} {shape}" for name, shape in asked.items() if name not in saved]
        lines += [f"not asked for: {name} {saved[name]}" for name in saved if name not in asked]
        lines += [
            f"{name} is {saved[name]}, asked for as {shape}"
            for name, shape in asked.items()
            if name in saved and tuple(saved[name]) != shape
        ]
        if lines:
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise CheckpointError(
                f"{self.folder / str(step)} holds another state: {'; '.join(lines[:5])}{more}; "
                "resume with the config it was made with, or begin a new run from its weights"
            )

    def _check_room(self, state: Mapping[str, Any]) -> None:
        if "://" in str(self.folder):
            return
        needed = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in getattr(leaf, "addressable_shards", ())
            if shard.replica_id == 0
        )
        free = shutil.disk_usage(self.folder).free
        if jax.process_count() > 1:  # all write to one disk, and all must save or none
            from jax.experimental import multihost_utils

            # float64 would lose its upper half here; mebibytes are exact enough
            told = multihost_utils.process_allgather(np.float32([needed / 2**20, free / 2**20]))
            needed, free = int(told[:, 0].sum() * 2**20), int(told[:, 1].min() * 2**20)
        if free < needed + 2**24:
            raise CheckpointError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, a checkpoint takes "
                f"{needed / 2**30:.2f} GiB; free some space (earlier checkpoints are whole)"
            )


def saved_steps(folder: Any) -> list[int]:
    """Return the steps of the finished checkpoints in a folder, in order; makes nothing."""
    folder = _absolute(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in entries if p.name.isdigit() and (p / STATE).is_dir())


def delete(folder: Any) -> None:
    """Delete the finished checkpoints in a folder, and nothing else in it."""
    for step in saved_steps(folder):
        (_absolute(folder) / str(step)).rmtree()


def open_state(folder: Any, step: int | None = None) -> ParamsReader:
    """Return the leaves of a run's state, to be read one by one; needs no devices.

    Args:
      folder: the run's checkpoints, on a local disk.
      step: which; the newest by default.

    Raises:
      CheckpointError: there is none.
    """
    folder = _absolute(folder)
    if "://" in str(folder):
        raise CheckpointError(
            f"{folder} is an object store; weights are read from a disk: copy a step's folder to "
            "checkpoints/ in the run's"
        )
    return _reader(folder, _chosen(folder, saved_steps(folder), step))


def _reader(folder: Any, step: int) -> ParamsReader:
    return ParamsReader(str(folder / str(step) / STATE))


def _chosen(folder: Any, steps: list[int], step: int | None) -> int:
    if not steps:
        raise CheckpointError(f"{folder} holds no finished checkpoint")
    if step is None:
        return steps[-1]
    if step not in steps:
        shown = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder} has no checkpoint of step {step}, only {shown}")
    return step


def _absolute(folder: Any) -> Any:
    from etils import epath

    path = epath.Path(folder)
    return path if "://" in str(folder) else epath.Path(path.absolute())


def _policy(keep: Keep) -> Any:
    from orbax.checkpoint import checkpoint_managers as managers

    rules: list[Any] = [managers.LatestN(keep.last)]
    if keep.every:
        rules.append(managers.EveryNSteps(keep.every))
    if keep.best:
        rules.append(
            managers.BestN(
                get_metric_fn=lambda metrics: metrics.get(keep.metric, math.inf),
                reverse=True,
                n=keep.best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return managers.AnyPreservationPolicy(rules)


def _named(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that Orbax gives leaves: keys, attributes and indices joined."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(state))[0]:
        names = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
        named["/".join(map(str, names))] = tuple(np.shape(leaf))
    return named
