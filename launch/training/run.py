"""A training run: weights loaded or resumed, the compiled step, the loop."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvr_jax import lora, parallel, tree
from clvr_jax.checkpoint import Checkpoints, Keep
from clvr_jax.data.loader import Loader, load
from clvr_jax.data.plan import Step
from clvr_jax.train import loop, optim
from clvr_jax.train.metrics import Writers
from clvr_jax.train.progress import Line
from clvr_jax.train.state import TrainState, abstract, initialise, shardings
from clvr_jax.train.step import Settings, compiled, joined, make_step
from clvr_jax.typing import Params
from conversion import runs
from conversion.load import load as load_weights
from conversion.sources import fingerprint
from launch import build
from launch.training import folder
from launch.training.select import Selection
from launch.training.stage import Data, Stage

_OTHERS = {"text_encoder": ("layers",)}  # stacked roots of models that are never trained


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage with everything that its step needs, still without arrays.

    Attributes:
      stage: what is trained.
      selection: which of its parameters.
      settings: precision and average.
      optimizer: settings of the optimiser.
      steps: length of the whole run.
      mesh: where it runs, None on one device.
    """

    stage: Stage
    selection: Selection
    settings: Settings
    optimizer: optim.Optim
    steps: int
    mesh: Mesh | None

    def trained(self) -> Params:
        """The trained parameters as shapes, as `TrainState.params`."""
        return jax.eval_shape(lambda params: self._split(params)[0], self.typed())

    def frozen_model(self) -> Params:
        """The frozen parameters of the trained model as shapes."""
        return jax.eval_shape(lambda params: self._split(params)[1], self.typed())

    def others(self) -> dict[str, Params]:
        """Other models as shapes, in the type to compute in."""
        kind = self.settings.compute_dtype
        return {
            name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), shapes)
            for name, shapes in self.stage.others.items()
        }

    def typed(self) -> Params:
        """The model's parameters as shapes, in the types in which training keeps them."""
        return self.selection.typed(self.stage.abstract, self.settings)

    def tx(self) -> Any:
        """The optimiser."""
        return optim.make(self.optimizer, self.trained(), self.steps, self.stage.stacked)

    def abstract(self) -> TrainState:
        """The state as shapes, each with its sharding."""
        shapes = abstract(self.trained(), self.tx(), self.settings.ema > 0)
        if self.mesh is None:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: place, shapes)
        else:
            places = self.state_places()
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def places(self) -> Params | None:
        """Shardings of the trained parameters."""
        if self.mesh is None:
            return None
        return parallel.shardings(self.trained(), self.mesh)

    def state_places(self) -> TrainState | None:
        """Shardings of the state."""
        if self.mesh is None:
            return None
        shapes = abstract(self.trained(), self.tx(), self.settings.ema > 0)
        return shardings(shapes, self.places())

    def step(self) -> Any:
        """The compiled step: (state, frozen, batch, key, static)."""
        rate = optim.schedule(self.optimizer, self.steps)
        made = make_step(self.loss, self.tx(), self.settings, rate, self.places())
        return compiled(made, self.state_places())

    def loss(self, params: Params, adapters: Params, *rest: Any) -> Any:
        """The stage's loss, given adapters as they are trained."""
        return self.stage.loss(params, self._scaled(adapters), *rest)

    def averaged(self, state: TrainState, frozen: Params) -> tuple[Params, Params]:
        """Return (parameters of the model, adapters) to use: averaged ones where there are any."""
        params, adapters = joined(self.settings.cast(state.averaged), frozen["model"])
        return params, self._scaled(adapters)

    def begin(self, params: Params, seed: int) -> tuple[TrainState, Params]:
        """Return the first state and the frozen parameters of the model, given all of them.

        New adapters are drawn from the seed, each where it lies. The given arrays are taken over.
        """
        if self.selection.rank:
            make = lambda: self._split(self.typed(), seed)[0]
            trained, frozen = jax.jit(make, out_shardings=self.places())(), params
        else:
            trained, frozen = self._split(params)
        return initialise(trained, self.tx(), self.settings.ema > 0, self.places()), frozen

    def _scaled(self, adapters: Params) -> Params:
        scale = self.selection.scale
        return lora.scaled(adapters, scale) if adapters and scale != 1 else adapters

    def _split(self, params: Params, seed: int = 0) -> tuple[Params, Params]:
        key, dtype = jax.random.key(seed), self.settings.param_dtype
        return self.selection.state_params(params, self.stage.stacked, key, dtype)


def load_state(job: Job, seed: int) -> tuple[TrainState, Params]:
    """Read the weights onto the devices; return the first state and the step's `frozen`.

    Raises:
      WeightsError: a file is broken or does not fit.
    """
    stage, sources = job.stage, job.stage.open()
    typed = job.typed()
    params = load_weights(sources[stage.component], typed, stage.stacked, _places(typed, job.mesh))
    state, frozen = job.begin(params, seed)
    return state, {"model": frozen, "others": load_others(job, sources)}


def load_others(job: Job, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Read frozen models, and put constants beside them."""
    others: dict[str, Any] = {}
    for name, shapes in job.others().items():
        stacked = _OTHERS.get(name, ())
        others[name] = load_weights(sources[name], shapes, stacked, _places(shapes, job.mesh))
    return {**others, **{name: put(job.mesh, value) for name, value in job.stage.constants.items()}}


def restore_state(job: Job, checkpoints: Checkpoints, step: int) -> tuple[TrainState, Params]:
    """Read a run's state, and of the weights only what it does not hold.

    Raises:
      CheckpointError: it cannot be read.
    """
    saved = loop.saved(job.abstract())
    state = loop.loaded(checkpoints.restore(step, saved))
    sources = job.stage.open()
    frozen = job.frozen_model()
    if tree.flatten(frozen):
        frozen = load_weights(
            sources[job.stage.component], frozen, job.stage.stacked, _places(frozen, job.mesh)
        )
    return state, {"model": frozen, "others": load_others(job, sources)}


def put(mesh: Mesh | None, value: np.ndarray) -> jax.Array:
    """Put a small array on every device."""
    if mesh is None:
        return jnp.asarray(value)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec()))


def batches(job: Job, data: Data, loader: Loader) -> Iterator[loop.Batch]:
    """Put every loaded step onto the devices."""
    for loaded in loader:
        step = data.steps[loaded.index]
        yield loop.Batch(
            loaded.static,
            place(job.mesh, loaded.arrays, step),
            data.counts(step),
            data.flops(step),
        )


def place(mesh: Mesh | None, arrays: Mapping[str, Any], step: Step) -> Any:
    """Put this process's rows of a step onto the devices, as part of all processes' rows."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, arrays)
    return jax.tree.map(lambda x: parallel.from_rows(x, mesh, step.rows.shape[1]), arrays)


def validation(job: Job, data: Data, frozen: Params, seed: int, limit: int) -> Any:
    """Return a hook's call: the loss over the first steps of a dataset, always the same draws."""
    count = min(limit, len(data.steps))
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)

    def sums(state, frozen, batch, number, static):
        params, adapters = job.averaged(state, frozen)
        rows, draws = jax.tree.map(lambda x: x[0], batch), jax.random.fold_in(key, number)
        total, weight, _ = job.stage.loss(params, adapters, frozen["others"], rows, draws, static)
        return total.astype(jnp.float32), weight.astype(jnp.float32)

    run = jax.jit(sums, static_argnums=4)

    def call(state: TrainState, done: int) -> dict[str, float]:
        total = weight = 0.0
        with load(data.steps, data.make, threads=2) as loader:
            for loaded in loader:
                step = data.steps[loaded.index]
                rows = place(job.mesh, loaded.arrays, step)
                made = run(state, frozen, rows, loaded.index, loaded.static)
                total, weight = total + float(made[0]), weight + float(made[1])
                if loaded.index + 1 == count:
                    break
        return {"validation_loss": total / weight}

    return call


def preview(job: Job, call: Any, frozen: Params, writers: Writers, where: Path) -> Any:
    """Return a hook's call: previews of the averaged parameters, or of the trained ones."""

    def run(state: TrainState, done: int) -> dict[str, float]:
        drawn = call(*job.averaged(state, frozen), frozen["others"], done, where)
        for name, image in drawn.items():
            writers.picture(done, name, image)
        return {}

    return run


def train(
    job: Job,
    config: Any,
    workdir: Path,
    data: Data,
    *,
    held_out: Data | None = None,
    preview_call: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    peak: float | None = None,
) -> TrainState:
    """Train in a folder from its last checkpoint, or from the weights.

    Raises:
      NotFinite, Interrupted, CheckpointError: see `clvr_jax.train.loop.train`.
      WeightsError: the weights cannot be read.
    """
    active = jax.process_index() == 0
    line = Line(job.steps, active)
    as_json = config.to_dict()
    if active:
        folder.begin(
            workdir, as_json, {**job.stage.record, **_record(job, config, data)}, overwrite
        )
    _together("begun")
    save = config.save
    checkpoints = Checkpoints(
        folder.checkpoints(workdir, config),
        Keep(save.last, save.keep_every, save.best, save.metric),
    )
    same = {"data": data.fingerprint, "rows": _rows(data), "frozen": _frozen(job)}
    averages: Mapping[str, Any] = {}
    if resume and checkpoints.steps():
        start, meta = checkpoints.meta()
        averages = meta["averages"]
        _compare(meta, same, workdir)
        state, frozen = restore_state(job, checkpoints, start)
        line.say(f"resumed at step {start} of {job.steps}")
    else:
        start = 0
        state, frozen = load_state(job, config.seed)
    writers = Writers(workdir, start, tuple(config.trackers), as_json, active)
    hooks = []
    if held_out is not None and config.validation.every:
        call = validation(job, held_out, frozen, config.seed, config.validation.steps)
        hooks.append(loop.Hook(config.validation.every, call, first=True))
    if preview_call is not None and config.preview.every:
        call = preview(job, preview_call, frozen, writers, workdir / folder.PREVIEWS)
        hooks.append(loop.Hook(config.preview.every, call, first=True))
    loader = load(data.steps, data.make, start, threads=config.data.threads)
    try:
        with build.use_mesh(job.mesh):
            return loop.train(
                state,
                job.step(),
                frozen,
                batches(job, data, loader),
                jax.random.key(config.seed),
                loop.When(job.steps, config.log, save.every),
                checkpoints=checkpoints,
                meta=same,
                writers=writers,
                line=line,
                hooks=tuple(hooks),
                peak=peak,
                averages=averages,
            )
    finally:
        line.end()
        loader.close()
        writers.close()
        checkpoints.close()


def _record(job: Job, config: Any, data: Data) -> dict[str, Any]:
    # the states of a run may lie elsewhere
    local = os.path.exists(config.weights) or runs.place(Path(config.weights)) is not None
    return {
        "stage": job.stage.name,
        "component": job.stage.component,
        "weights": os.path.abspath(config.weights) if local else config.weights,
        "checkpoints": config.save.folder,
        "data": {"path": data.path, "records": data.records, "fingerprint": data.fingerprint},
        "steps": job.steps,
        "adapter_scale": job.selection.scale,
    }


def _frozen(job: Job) -> dict[str, str]:
    """Fingerprints of the weights that a run reads and does not train."""
    stage, sources = job.stage, job.stage.open()
    parts = {name: (shapes, _OTHERS.get(name, ())) for name, shapes in stage.others.items()}
    if tree.flatten(job.frozen_model()):
        parts[stage.component] = stage.abstract, stage.stacked
    return {name: fingerprint(sources[name], *part) for name, part in parts.items()}


def _compare(meta: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> None:
    """Refuse to go on with what would not be the same run."""
    said = {
        "data": "the content of the data",
        "rows": "the rows of a step (batch.accumulation, batch.rows x mesh.data x mesh.fsdp)",
        "frozen": "the fingerprint of weights that are not trained",
    }
    for name, words in said.items():
        if meta[name] != now[name]:
            raise ValueError(
                f"{workdir}: {words} was {meta[name]} and is {now[name]}, so that the run cannot "
                "go on where it was; restore it, or begin a new run from its weights: "
                f"--config.weights={workdir} --workdir=ANOTHER"
            )


def _rows(data: Data) -> list[int]:
    return list(data.steps[0].rows.shape[:2])


def _places(shapes: Params, mesh: Mesh | None) -> Params | None:
    return None if mesh is None else parallel.shardings(shapes, mesh)


def _together(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
