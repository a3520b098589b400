"""Metrics of a run: averages over steps, and where they are written.

JSONL always; TensorBoard and Weights & Biases are optional and need the extras of their names. A
resumed run goes on in the same files and the same run: what an interrupted one wrote beyond the
checkpoint it resumes from is dropped.
"""

import importlib.util
import io
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from clu import metrics as clu_metrics

FILE = "metrics.jsonl"
TRACKERS = ("tensorboard", "wandb")


class Averages:
    """Weighted means over the steps since the last `take`; knows what names come.

    Args:
      sums: of steps added before, from `sums`.
    """

    def __init__(self, sums: Mapping[str, Any] | None = None):
        self._merged: dict[str, clu_metrics.Average] = {}
        self.add({name: tuple(pair) for name, pair in (sums or {}).items()})

    def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Add a step's pairs (sum, weight) on the host."""
        for name, (total, weight) in pairs.items():
            new = clu_metrics.Average(np.float64(total), np.float64(weight))
            self._merged[name] = self._merged[name].merge(new) if name in self._merged else new

    def sums(self) -> dict[str, list[float]]:
        """Return what has been added as [sum, weight] by name, for JSON."""
        return {n: [float(m.total), float(m.count)] for n, m in self._merged.items()}

    def take(self) -> dict[str, float]:
        """Return the means, and forget; what had no weight is left out."""
        merged, self._merged = self._merged, {}
        return {n: float(m.total) / float(m.count) for n, m in merged.items() if m.count > 0}


def check(trackers: tuple[str, ...]) -> None:
    """Look whether trackers can be used.

    Raises:
      ValueError: one is unknown, or its package is not installed.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise ValueError(f"tracker {name!r} is unknown; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'the tracker {name} needs: pip install -e ".[{name}]"')


class Writers:
    """Where numbers and pictures go; on processes other than the first, nowhere.

    Args:
      folder: the run's folder.
      start: steps that the run has done; later lines of an earlier attempt are dropped.
      trackers: of `TRACKERS`.
      config: shown by trackers.
      active: whether this process writes.

    Raises:
      ValueError: a tracker is unknown or its package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        start: int = 0,
        trackers: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        check(trackers)
        made = {"tensorboard": _TensorBoard, "wandb": _Wandb}
        self._writers: list[Any] = []
        if active:
            self._writers = [_Jsonl(folder / FILE, start)]
            self._writers += [made[name](folder, start, dict(config or {})) for name in trackers]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step."""
        for writer in self._writers:
            writer.scalars(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture (height, width, 3) uint8 where a tracker can."""
        for writer in self._writers:
            writer.picture(step, name, image)

    def close(self) -> None:
        """Write everything out."""
        for writer in self._writers:
            writer.close()


class _Jsonl:
    def __init__(self, file: Path, start: int):
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if start and _step(line) <= start]  # at 0 it begins anew
        partial = file.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, file)
        self._file = file.open("a", buffering=1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Pictures are files of their own."""

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # cut off by a kill
        return float("inf")


class _TensorBoard:
    def __init__(self, folder: Path, start: int, config: Mapping[str, Any]):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        # readers forget what an earlier attempt wrote from here on
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = start + 1 if start else 0
        self._writer.add_event(self._event(step=first, session_log=log))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(step, entries)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        height, width, _ = image.shape
        encoded = self._summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=_png(image)
        )
        self._add(step, [self._summary.Value(tag=name, image=encoded)])

    def _add(self, step: int, entries: list[Any]) -> None:
        summary = self._summary(value=entries)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, start: int, config: Mapping[str, Any]):
        import wandb

        known = folder / "wandb_id.txt"
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            id=known.read_text().strip(),
            resume="allow",
            dir=str(folder),
            name=folder.name,
            config=dict(config),
        )
        # wandb's own steps only grow: it would drop what a resumed run computes a second time
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()
