"""The folder of a run: what is recorded in it, and when it may be gone on with.

config.json        the final config; a resumed run must agree with it
run.json           weights, data, how inputs are made; every start with commit, versions, devices
checkpoints/       states
metrics.jsonl      numbers
previews/          pictures or texts
lock               held by the process that trains here
"""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clvr_jax.checkpoint import delete, saved_steps
from clvr_jax.tree import flatten
from conversion import runs
from launch.bench.machine import environment
from launch.pictures import write_text

CONFIG, RUN, CHECKPOINTS, PREVIEWS = "config.json", "run.json", "checkpoints", "previews"
LOCK = "lock"
# what may be another on resume: it changes no number that training computes
FREE = (
    "log",
    "save/every",
    "save/last",
    "save/keep_every",
    "save/best",
    "save/metric",
    "validation",
    "preview",
    "trackers",
    "data/threads",
    "data/validation",
    "mesh",
    "batch/rows",  # of a device: those of all devices are compared with the checkpoint's
    "attention",
    "remat",
    "chunk",
)


def prepare(folder: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Decide whether a run may begin, or go on, in a folder. Nothing is written.

    Raises:
      ValueError: both or neither of resume and overwrite suit what is there, the config differs
        from the run's in what it computes (names every key), or its folder of states has another
        run's.
    """
    if resume and overwrite:
        raise ValueError("give one of --resume and --overwrite")
    exists, elsewhere = (folder / CONFIG).exists(), config["save"]["folder"]
    if not exists and folder.exists() and any(f.name != LOCK for f in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another --workdir")
    own = exists and read(folder / CONFIG)["save"]["folder"] == elsewhere
    if elsewhere and not own and saved_steps(elsewhere):
        raise ValueError(
            f"--config.save.folder={elsewhere} holds the checkpoints of another run; choose another"
        )
    weights = Path(config["weights"]).absolute()
    if overwrite and folder.absolute() in (weights, *weights.parents):
        raise ValueError(
            f"--overwrite would delete the weights {config['weights']} to begin from; choose "
            "another --workdir"
        )
    if not exists or overwrite:
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a run: --resume goes on with it, --overwrite deletes it to begin anew"
        )
    compare(folder, config)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, for as long as this lasts.

    File systems that have no locks are not guarded.

    Raises:
      ValueError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder}: process {file.read().strip()} is training there; wait for it or end "
                "it, or choose another --workdir"
            ) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


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


def pinned(folder: Path, weights: str, resume: bool) -> str:
    """Return weights as a run is to name them: of another run one checkpoint, whatever comes later.

    A run that is gone on with keeps the checkpoint that it began from.

    Raises:
      CheckpointError: the other run has no checkpoint.
    """
    at = runs.place(Path(weights))
    if at is None or at.step is not None:
        return weights
    if resume and (folder / CONFIG).exists():
        known = read(folder / CONFIG)["weights"]
        if Path(known).parent == Path(weights) / runs.CHECKPOINTS:
            return known
    return os.fspath(Path(weights) / runs.CHECKPOINTS / str(at.newest()))


def begin(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any], overwrite: bool):
    """Write what a run records; the first process calls this.

    A start is added to those before. Config and record stay those of the first start, unless that
    has saved nothing.
    """
    if overwrite and (folder / CONFIG).exists():
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = read(folder / RUN) if (folder / RUN).exists() else {"starts": []}
    if not saved_steps(config["save"]["folder"] or folder / CHECKPOINTS):
        before = {**record, "starts": before["starts"]}
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    before["starts"].append(start())
    write_text(folder / RUN, json.dumps(before, indent=2) + "\n")


def _clear(folder: Path) -> None:
    """Delete a run, its states first, and nothing that it did not make."""
    if elsewhere := read(folder / CONFIG)["save"]["folder"]:
        delete(elsewhere)
    for name in (CHECKPOINTS, PREVIEWS, "tensorboard", "wandb"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("metrics.jsonl", "wandb_id.txt", RUN, CONFIG):
        (folder / name).unlink(missing_ok=True)


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
