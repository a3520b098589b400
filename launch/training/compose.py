"""From a config to a job with its data: the part that looks at weights, data and devices."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from clvr_jax import parallel, tree
from clvr_jax.checkpoint import Keep
from clvr_jax.train import metrics, optim
from clvr_jax.train.step import Settings
from launch import build
from launch.bench.machine import limits_of
from launch.training import image, vlm, world, world_vlm
from launch.training.run import Job
from launch.training.select import selection
from launch.training.stage import Data, Stage

# what finds the weights of each stage, makes its networks and its loss, and plans its data
_PARTS = {
    "image": image,
    "vlm": vlm,
    "world_vae": world,
    "world_klein": world,
    "world_vlm": world_vlm,
}
_LEAST = {
    "log": 1,
    "chunk": 1,
    "data/threads": 0,
    "save/every": 0,
    "validation/every": 0,
    "validation/steps": 1,
    "preview/every": 0,
    "preview/samples": 0,
    "preview/steps": 1,
    "preview/tokens": 1,
}


def compose(config: Any) -> tuple[Job, Data, Data | None, Any]:
    """Return (job, training data, validation data, preview call) of a config on these devices.

    Everything that can be wrong is told here, before weights are read.

    Raises:
      FileNotFoundError, ValueError: weights or data are not there, or do not fit one another.
    """
    check(config)
    mesh = build.make_mesh(config.mesh)
    if mesh is None:
        parallel.make_mesh(config.mesh.to_dict())  # sizes that one device does not make
    rows = rows_of(config, mesh)
    process = parallel.row_share(mesh, rows)
    length: Mapping[str, int] = (
        {"steps": config.steps} if config.steps else {"epochs": config.epochs}
    )
    if config.data.get("features") and config.preview.every > 0:
        raise ValueError(
            "previews need the text encoder and the VAE, which data.features keeps off the "
            "devices; give --config.preview.every=0, or no features"
        )
    parts = _PARTS[config.stage]
    weights = parts.find(config)
    nets = parts.networks(config, weights)
    stage = parts.stage(config, nets, weights)
    read = lambda path, **options: parts.data(path, config, nets, weights, rows, process, **options)
    data = read(config.data.train, **length)
    held_out = None
    if config.data.validation:
        held_out = read(config.data.validation, epochs=1, validation=True)
    if config.data.get("features"):
        say = lambda text: print(text, file=sys.stderr, flush=True)
        for each in filter(None, (data, held_out)):
            image.precompute(config, nets, weights, each, mesh, process, say)
    preview = None
    writes = jax.process_index() == 0
    if config.stage == "image" and config.preview.every > 0:
        preview = image.previews(config, nets, weights, held_out or data, writes)
    elif config.stage == "vlm" and config.preview.every > 0 and config.preview.samples > 0:
        preview = vlm.previews(config, nets, weights, held_out or data, mesh, writes)
    return make_job(config, stage, len(data.steps), mesh), data, held_out, preview


def check(config: Any) -> None:
    """Tell wrong options before anything is looked at.

    Raises:
      ValueError: a number is too small, or checkpoints are to be kept by a number that never comes.
    """
    metrics.check(tuple(config.trackers))
    optimizer(config)
    selection(config)
    given = tree.flatten(config.to_dict())
    for name, least in _LEAST.items():
        if given.get(name, least) < least:
            name, value = name.replace("/", "."), given[name]
            raise ValueError(f"--config.{name} is {value}; it must be {least} or more")
    save, every = config.save, config.validation.every
    Keep(save.last, save.keep_every, save.best, save.metric)
    if save.best and save.metric not in ("loss", "validation_loss"):
        raise ValueError(f"save.metric is {save.metric!r}; choose loss or validation_loss")
    if save.best and save.metric == "validation_loss":
        if not (config.data.validation and every):
            raise ValueError(
                "save.best keeps the checkpoints of the lowest validation_loss, which is not "
                "measured: give --config.data.validation and --config.validation.every, or "
                "--config.save.metric=loss"
            )
        if save.every % every:
            raise ValueError(
                f"save.best needs the validation_loss of every checkpoint: save.every {save.every} "
                f"must be a multiple of validation.every {every}"
            )


def make_job(config: Any, stage: Stage, steps: int, mesh: Mesh | None) -> Job:
    """Return the job of a stage; checks what is selected and how it is optimised.

    Raises:
      ValueError: an option is unknown, or a pattern matches nothing.
    """
    job = Job(
        stage,
        selection(config),
        Settings(config.precision, config.ema),
        optimizer(config),
        steps,
        mesh,
    )
    job.tx()
    return job


def optimizer(config: Any) -> optim.Optim:
    """Return the optimiser's settings of a config.

    Raises:
      ValueError: a value is unknown.
    """
    given = config.optim.to_dict()
    given["groups"] = tuple((str(pattern), float(factor)) for pattern, factor in given["groups"])
    given["momentum"] = tuple(given["momentum"])
    return optim.Optim(**given)


def rows_of(config: Any, mesh: Any) -> int:
    """Return the rows of a micro-batch over all devices.

    Raises:
      ValueError: a batch size is not positive.
    """
    if config.batch.rows < 1 or config.batch.accumulation < 1:
        raise ValueError(
            f"batch.rows {config.batch.rows} and batch.accumulation {config.batch.accumulation} "
            "must be 1 or more"
        )
    return config.batch.rows * parallel.row_devices(mesh)


def peak() -> float | None:
    """Return the bfloat16 FLOP/s of all devices, None for devices whose peak is not known."""
    each, _ = limits_of(jax.devices()[0].device_kind)
    return None if each is None else each * 1e12 * jax.device_count()
