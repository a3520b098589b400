"""What a run would be, without running it: sizes, sharding, FLOPs, memory, the first batch."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from clvr_jax import parallel
from clvr_jax.data.plan import Step
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.train.state import abstract
from conversion.hub import HubError
from launch import aot, build
from launch.plan import memory, report, targets
from launch.plan.image import Image
from launch.plan.job import Job as Plan
from launch.plan.vlm import Text
from launch.training import compose, image, vlm
from launch.training.run import Job


def show(config: Any, target: str, out: str | None = None) -> None:
    """Print the plan of a config on a target, and the first batch where data and weights are there.

    Args:
      config: of a stage.
      target: a name of `launch.plan.targets`.
      out: JSON file for what compiling for the target found.

    Raises:
      ValueError: the target or an option is unknown, a pattern matches nothing, or there is to be
        a file and nothing is compiled for the target.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a plan downloads nothing
    compose.check(config)
    if config.stage not in ("image", "vlm"):
        raise ValueError(
            f"--dry_run plans the stages image and vlm, not {config.stage}: the miniature's fit on "
            "any machine; run them without it"
        )
    machine = targets.parse(target)
    devices = _topology(machine)
    sizes = targets.mesh_sizes(config.mesh.to_dict(), machine.devices)
    rows = config.batch.rows * sizes["data"] * sizes["fsdp"]
    stage_of = image if config.stage == "image" else vlm
    weights, why = None, ""
    try:
        weights = stage_of.find(config)
    except (FileNotFoundError, HubError) as error:
        if not config.sizes:
            raise
        why = str(error)
    nets = stage_of.networks(config, weights)
    stage = stage_of.stage(config, nets, weights)
    step, length, data = stage_of.nominal(config, nets, rows), 1000, None
    if weights is not None and config.data.train:
        given = {"steps": config.steps} if config.steps else {"epochs": config.epochs}
        data = stage_of.data(config.data.train, config, nets, weights, rows, (0, 1), **given)
        step, length = _largest(data.steps), len(data.steps)
    job = compose.make_job(config, stage, length, None)
    plan = _plan(config, nets, job, machine, sizes, rows, step)
    compiled, size = None, None
    if devices and not config.data.get("features"):
        arrays = stage_of.shapes(config, nets, step)
        try:
            compiled = _compiled(job, devices, sizes, step, arrays)
            size = compiled.peak
        except aot.TooLarge as error:
            print(f"the compiler: {error}")
            size = error.size
    report.show(plan, size)
    if compiled:
        print(_exchanged(compiled))
    if out and compiled is None:
        raise ValueError(
            f"--out is for what compiling finds, and nothing was compiled for {machine.name}: that "
            "takes a TPU slice that the step fits into, libtpu, and encoders on the devices"
        )
    if out:
        text = json.dumps(_report(plan, compiled), indent=2)
        Path(out).write_text(text + "\n")
    if data is None:
        missing = "--config.data.train is not given" if weights is not None else why
        print(f"the first batch is not shown, and a nominal one was planned for: {missing}")
        return
    print(f"{data.records} records, {length} steps, {len(data.steps.statics())} programs")
    print(data.describe(data.steps[0]))


def _topology(machine: targets.Target) -> list[Any] | None:
    """Devices to compile for: a TPU slice where libtpu is installed."""
    if machine.topology is None:
        return None
    try:
        return aot.topology(machine.topology)
    except ValueError as error:
        print(f"not compiled for {machine.name}, memory by formula: {error}", file=sys.stderr)
        return None


def _largest(steps: Any) -> Step:
    """The step whose rows hold the most, for memory."""
    largest = max(steps.statics(), key=_tokens)
    return next(step for step in steps if step.static == largest)


def _tokens(static: Any) -> int:
    if isinstance(static, Layout):
        return static.text + static.image_tokens
    return static.tokens + static.images * static.patches


def _plan(config, nets, job: Job, machine, sizes, rows: int, step: Step) -> Plan:
    if config.stage == "image":
        work: Any = Image(
            nets.transformer.cfg,
            nets.text_encoder.cfg,
            nets.vae.cfg,
            step.static,
            rows,
            config.remat,
            bool(config.data.features),
        )
    else:
        shape = step.static
        work = Text(
            _vlm_sizes(nets),
            rows,
            shape.tokens,
            images=shape.images,
            patches=shape.patches,
            chunk=config.chunk,
            remat=config.remat,
        )
    trained = job.trained()
    state = abstract(trained, job.tx(), job.settings.ema > 0)
    return Plan(
        name=f"{config.stage} SFT of {config.sizes or config.weights}",
        target=machine,
        mesh=sizes,
        work=work,
        trained=trained.get("model", {}),
        fixed=job.frozen_model(),
        adapters=trained.get("lora", {}),
        optimizer=state.opt_state,
        ema=state.ema,
        frozen=job.others(),
        accumulation=config.batch.accumulation,
        compute=job.settings.compute_dtype,
    )


def _vlm_sizes(nets: Any) -> Qwen3VLConfig:
    # the special tokens do not matter here
    base = qwen3_vl.VARIANTS["tiny"]
    return dataclasses.replace(base, text=nets.language.cfg, vision=nets.vision.cfg)


def _compiled(job: Job, devices, sizes, step: Step, arrays) -> aot.Compiled:
    """The step, compiled for the target's devices."""
    mesh: Mesh = parallel.make_mesh(sizes, devices)
    job = dataclasses.replace(job, mesh=mesh)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.row_sharding(mesh))
    frozen = {
        "model": aot.placed(job.frozen_model(), mesh),
        "others": {
            **{name: aot.placed(tree, mesh) for name, tree in job.others().items()},
            **{name: aot.whole(x, mesh) for name, x in job.stage.constants.items()},
        },
    }
    key = aot.whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)

    def lower() -> Any:
        with build.use_mesh(mesh):
            return job.step().lower(
                job.abstract(), frozen, jax.tree.map(place, arrays), key, step.static
            )

    return aot.compiled(lower)


def _exchanged(compiled: aot.Compiled) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in compiled.collectives.items())
    took = f"compiled in {compiled.seconds:.0f} s"
    return f"collectives in the program's text: {kinds or 'none'}; {took}"


def _report(plan: Plan, compiled: aot.Compiled) -> dict[str, Any]:
    gib = lambda size: round(size / targets.GIB, 2)
    return {
        "command": "python -m launch.train " + " ".join(sys.argv[1:]),
        "topology": plan.target.topology,
        "chips": plan.target.devices,
        "mesh": {axis: size for axis, size in plan.mesh.items() if size > 1},
        "jax": jax.__version__,
        "work": f"{plan.work.describe()}, {plan.accumulation} micro-batches a step",
        "arguments_gib": gib(compiled.arguments),
        "donated_gib": gib(compiled.donated),
        "temporary_gib": gib(compiled.temporary),
        "at_once_gib": gib(compiled.peak),
        "by_formula_gib": gib(memory.of(plan).total),
        "limit_gib": gib(plan.target.memory),
        "collectives": compiled.collectives,
        "compile_seconds": round(compiled.seconds, 1),
    }
