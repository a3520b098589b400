"""The folder of a run: what is recorded in it, and when it may be gone on with.

config.json        the final config; a resumed run must agree with it
run.json           weights, data, how inputs are made; every start with commit, versions, devices
checkpoints/       states
metrics.jsonl      numbers
previews/          pictures or texts
"""

import datetime
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clvr_jax.tree import flatten
from launch.bench.machine import environment
from launch.pictures import write_text

CONFIG, RUN, CHECKPOINTS, PREVIEWS = "config.json", "run.json", "checkpoints", "previews"
# what may be another on resume: it changes no number that training computes
FREE = (
    "log",
    "save",
    "validation",
    "preview",
    "trackers",
    "data/threads",
    "data/validation",
    "mesh",
    "attention",
    "remat",
    "chunk",
)


def prepare(folder: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Decide whether a run may begin, or go on, in a folder. Nothing is written.

    Raises:
      ValueError: both or neither of resume and overwrite suit what is there, or the config differs
        from the run's in what it computes; names every key.
    """
    if resume and overwrite:
        raise ValueError("give one of --resume and --overwrite")
    if not (folder / CONFIG).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run; choose another --workdir")
        return
    if overwrite:
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a run: --resume goes on with it, --overwrite deletes it to begin anew"
        )
    compare(folder, config)


def compare(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare a config with that of the run in a folder.

    Raises:
      ValueError: they differ in what is computed.
    """
    saved, given = flatten(read(folder / CONFIG)), flatten(json.loads(json.dumps(config)))
    lines = []
    for key in [*saved, *(key for key in given if key not in saved)]:
        if any(key == free or key.startswith(free + "/") for free in FREE):
            continue
        if saved.get(key) != given.get(key):
            name = key.replace("/", ".")
            lines.append(
                f"--config.{name}: the run has {saved.get(key)!r}, {given.get(key)!r} given"
            )
    if lines:
        raise ValueError(
            f"{folder} was begun with another config:\n" + "\n".join(lines) + "\ngive the run's "
            "values to go on with it, or begin a new run from its weights: "
            f"--config.weights={folder} --workdir=ANOTHER"
        )


def begin(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any], overwrite: bool):
    """Write what a run records; the first process calls this.

    A start is added to those before; the rest of the record stays that of the first start.
    """
    if overwrite and (folder / CONFIG).exists():
        for name in (CHECKPOINTS, PREVIEWS, "tensorboard", "wandb"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (CONFIG, RUN, "metrics.jsonl", "wandb_id.txt"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    before = read(folder / RUN) if (folder / RUN).exists() else {**record, "starts": []}
    before["starts"].append(start())
    write_text(folder / RUN, json.dumps(before, indent=2) + "\n")
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def start() -> dict[str, Any]:
    """Return when, by what command, on what, and with which code and versions this process runs."""
    import jax

    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processes": jax.process_count(),
        **environment("launch.train"),
    }


def read(file: Path) -> dict[str, Any]:
    """Return a JSON file of a run.

    Raises:
      ValueError: it is no JSON.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} is no JSON ({error}); it is part of a run and was changed"
        ) from error


def checkpoints(folder: Path, config: Any) -> str:
    """Return where the states of a run are: beside it, or in an object store."""
    return config.save.folder or os.fspath(folder / CHECKPOINTS)
