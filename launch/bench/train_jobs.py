"""What the training benchmark trains: the two stages with random weights and synthetic steps."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clvr_jax import parallel
from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import Epochs, Step
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.qwen3_vl import model as qwen3_vl
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.processor import Picture
from clvr_jax.sft.image.loss import Settings
from clvr_jax.sft.vlm import batches, examples
from clvr_jax.train.state import abstract
from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Params
from configs import image_sft, vlm_sft
from conversion.components import Component
from launch import build
from launch.bench.flops import Training
from launch.bench.text import MODELS as VLMS
from launch.bench.weights import random_params
from launch.plan import targets
from launch.plan.image import Image
from launch.plan.job import Job as Plan
from launch.plan.vlm import Text
from launch.training import compose, image, vlm
from launch.training.run import Job
from launch.training.stage import Data

FLY, PRECOMPUTED = "fly", "precomputed"
_LEVELS = np.tile((np.arange(256) / 127.5 - 1).astype(np.float32), (3, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      subject: image or vlm.
      model: its sizes: a key of `launch.bench.image.MODELS` or of `launch.bench.text.MODELS`.
      lora: rank of the adapters; 0 for full fine-tuning.
      rows: of a micro-batch, per device along data and fsdp.
      accumulation: micro-batches of a step.
      precision: float32, mixed or bfloat16 (`clvr_jax.train.step.Settings`).
      moments: float32 or bfloat16 (`clvr_jax.train.optim.Optim`).
      remat: what the backward pass keeps.
      mesh: sizes of the mesh's axes.
      size: image: height and width in pixels.
      references: image: reference pictures of that size.
      text_tokens: image: text length, padding included.
      features: image: text features and latents made on the fly, or precomputed.
      tokens: vlm: of a row, all of them one conversation.
      pictures: vlm: of a row, square ones.
      picture: vlm: their edge in pixels.
      train: vlm: pattern of the trained parameters.
    """

    subject: str
    model: str
    lora: int = 0
    rows: int = 1
    accumulation: int = 1
    precision: str = "mixed"
    moments: str = "float32"
    remat: str = "full"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    size: tuple[int, int] = (1024, 1024)
    references: int = 0
    text_tokens: int = 512
    features: str = FLY
    tokens: int = 4096
    pictures: int = 1
    picture: int = 1024
    train: str = ".*"


@dataclasses.dataclass(frozen=True)
class Work:
    """A job with a synthetic step for it, still without arrays on devices.

    Attributes:
      job: what trains.
      networks: of its stage.
      cfg: sizes of the trained model.
      step: what every step reads.
      arrays: its leaves on the host, as shapes in a dry run.
      units: what one step goes through, by name: pictures or tokens.
      plan: the same run for `launch.plan`.
    """

    job: Job
    networks: Any
    cfg: Any
    step: Step
    arrays: Any
    units: Mapping[str, float]
    plan: Plan

    @property
    def flops(self) -> Training:
        """FLOPs of one step."""
        parts = self.plan.work.flops(self.plan).values()
        return sum(parts, Training()) * self.plan.accumulation

    def data(self, steps: int) -> Data:
        """Return so many steps that all read the same arrays, as a dataset of a run."""
        return Data(
            path="synthetic",
            records=1,
            fingerprint="",
            steps=Epochs(lambda epoch: [self.step], steps=steps),
            make=lambda step: self.arrays,
            counts=lambda step: self.units,
            flops=lambda step: float(self.flops.model),
            describe=lambda step: str(step.static),
        )


def make(case: Case, steps: int, target: str | None = None) -> Work:
    """Return the work of a case.

    Args:
      case: what is measured.
      steps: length of the run, for the schedule.
      target: a machine that need not be there (`launch.plan.targets`): the step's arrays are
        shapes then, and its job runs on one device. None for the devices that are there.

    Raises:
      ValueError: the case does not fit the model, or a value is unknown.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **case.mesh}
    mesh = None if target else build.make_mesh(sizes)
    machine = targets.parse(target or targets.HERE)
    spread = targets.mesh_sizes(sizes, machine.devices)
    config = _config(case)
    rows = case.rows * spread["data"] * spread["fsdp"]
    made = _image if case.subject == "image" else _vlm
    networks, cfg, stage, step, arrays, units, work = made(case, config, rows, target is None)
    job = compose.make_job(config, stage, steps, mesh)
    trained = job.trained()
    plan = Plan(
        name=case.model,
        target=machine,
        mesh=spread,
        work=work,
        trained=trained.get("model", {}),
        fixed=job.frozen_model(),
        adapters=trained.get("lora", {}),
        optimizer=abstract(trained, job.tx()).opt_state,
        frozen=job.others(),
        accumulation=case.accumulation,
        compute=job.settings.compute_dtype,
    )
    return Work(job, networks, cfg, step, arrays, units, plan)


def weights(job: Job) -> Params:
    """Return random parameters of the trained model where training keeps them."""
    return _random(job.typed(), job.stage.stacked, job.mesh, 0)


def others(job: Job) -> dict[str, Any]:
    """Return random parameters of the frozen models, and the stage's constants."""
    made: dict[str, Any] = {
        name: _random(shapes, ("layers",) if name == "text_encoder" else (), job.mesh, seed)
        for seed, (name, shapes) in enumerate(job.others().items(), 1)
    }
    place = lambda x: jnp.asarray(x) if job.mesh is None else jax.device_put(x, _everywhere(job))
    return {**made, **{name: place(value) for name, value in job.stage.constants.items()}}


def _random(shapes: Params, stacked: tuple[str, ...], mesh: Mesh | None, seed: int) -> Params:
    if mesh is None:
        return random_params(shapes, seed, stacked)
    places, made = flatten(parallel.shardings(shapes, mesh)), {}
    for i, (path, leaf) in enumerate(flatten(shapes).items()):  # one at a time is ever whole
        one = random_params(unflatten({path: leaf}), 1000 * seed + i, stacked)
        made[path] = jax.device_put(flatten(one)[path], places[path])
    return unflatten(made)


def _everywhere(job: Job) -> Any:
    return jax.sharding.NamedSharding(job.mesh, jax.sharding.PartitionSpec())


def _config(case: Case) -> Any:
    """The stage's own config with the options of a case."""
    config = (image_sft if case.subject == "image" else vlm_sft).get_config("toy")
    config.sizes = case.model
    config.precision, config.remat, config.train = case.precision, case.remat, case.train
    config.lora.rank, config.optim.moments = case.lora, case.moments
    config.optim.learning_rate, config.optim.schedule = 1e-5, "constant"
    config.optim.warmup = 0.0
    config.batch.rows, config.batch.accumulation = case.rows, case.accumulation
    if case.subject == "image":
        config.data.features = "features" if case.features == PRECOMPUTED else ""
        config.condition.buckets = (case.text_tokens,)
    else:
        config.data.tokens = case.tokens
    return config


def _image(case: Case, config: Any, rows: int, with_arrays: bool) -> tuple[Any, ...]:
    nets = image.networks(config, None)
    factor = nets.vae.cfg.factor
    height, width = case.size
    if height % factor or width % factor or min(case.size) < factor:
        raise ValueError(f"size {height}x{width}: both must be positive multiples of {factor}")
    side = (height // factor, width // factor)
    layout = Layout(case.text_tokens, side, (side,) * case.references)
    step = Step(layout, np.zeros((case.accumulation, rows), np.int64))
    shapes = image.shapes(config, nets, step)
    if case.features == PRECOMPUTED:
        kind = jnp.float32 if case.precision == "float32" else jnp.bfloat16
        leaf = lambda *axes: jax.ShapeDtypeStruct((*step.rows.shape, *axes), kind)
        channels = nets.transformer.cfg.channels
        shapes = {
            "weights": shapes["weights"],
            "text": leaf(case.text_tokens, nets.text_encoder.cfg.feature_width),
            "latents": leaf(*side, channels),
            "reference_latents": [leaf(*side, channels)] * case.references,
        }
    arrays = _drawn(shapes, nets.text_encoder.cfg.vocab) if with_arrays else shapes
    work = Image(
        nets.transformer.cfg,
        nets.text_encoder.cfg,
        nets.vae.cfg,
        layout,
        rows,
        case.remat,
        case.features == PRECOMPUTED,
    )
    units = {"images": float(step.rows.size)}
    stage = image.stage(config, nets, None)
    return nets, nets.transformer.cfg, stage, step, arrays, units, work


def _drawn(shapes: Any, vocab: int) -> Any:
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[0].key
        if name == "weights":
            return np.ones(x.shape, x.dtype)
        if name == "ids":
            return rng.integers(1, vocab, x.shape, x.dtype)
        if name == "lengths":
            return np.full(x.shape, shapes["ids"].shape[-1], x.dtype)
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, x.dtype)
        return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _vlm(case: Case, config: Any, rows: int, with_arrays: bool) -> tuple[Any, ...]:
    if case.model not in VLMS:
        raise ValueError(f"model {case.model!r} is unknown; choose from {', '.join(VLMS)}")
    cfg = VLMS[case.model]
    example = conversation(case, cfg)  # tells what does not fit
    nets = vlm.networks(config, Component("vlm", "diffusers", Path(), cfg))
    # of the smallest sizes, which are then exchanged
    config.sizes = "tiny"
    stage = dataclasses.replace(
        vlm.stage(config, nets, None),
        abstract=qwen3_vl.abstract_params(cfg),
        constants={"levels": _LEVELS},
    )
    side = case.picture // cfg.vision.patch
    patches = side * side if case.pictures else 0
    shape = Shape(case.tokens, case.pictures, -(-patches // 64) * 64)
    lead = (case.accumulation, rows)
    step = Step(shape, np.zeros((*lead, 1), np.int64))
    if with_arrays:
        arrays = batches.make(step, lambda i: example, cfg.vision)
    else:
        arrays = vlm.shapes(config, nets, step)
    work = Text(
        cfg,
        rows,
        case.tokens,
        images=case.pictures,
        patches=patches,
        chunk=config.chunk,
        remat=case.remat,
    )
    units = {"tokens": float(case.tokens * case.accumulation * rows)}
    return nets, cfg, stage, step, arrays, units, work


def conversation(case: Case, cfg: Qwen3VLConfig) -> examples.Example:
    """Return pictures, then random words up to the row's length, all of which are learnt.

    Raises:
      ValueError: the pictures leave no room for words, or their edge is no multiple of a cell's.
    """
    side, cell = case.picture // cfg.vision.patch, cfg.vision.cell
    edge = cfg.vision.patch * cfg.vision.merge
    if case.pictures and case.picture % edge:
        raise ValueError(f"picture {case.picture} must be a multiple of {edge}")
    each = side * side // cell + 2  # with the tokens before and behind
    if case.pictures * each + 2 > case.tokens:
        raise ValueError(
            f"{case.pictures} pictures of {each} tokens leave no room for words in "
            f"{case.tokens} tokens"
        )
    rng = np.random.default_rng(2)
    special = min(cfg.image_token, cfg.vision_start, cfg.vision_end, cfg.video_token)
    ids = rng.integers(1, special, case.tokens, np.int32)
    width = cfg.vision.patch_width // cfg.vision.temporal_patch
    pictures = []
    for i in range(case.pictures):
        start = i * each
        ids[start], ids[start + each - 1] = cfg.vision_start, cfg.vision_end
        ids[start + 1 : start + each - 1] = cfg.image_token
        patches = rng.integers(0, 256, (side * side, width), np.uint8)
        pictures.append((start + 1, Picture(patches, (side, side))))
    grids = [picture.grid for _, picture in pictures]
    positions, _ = qwen3_vl.position_ids(ids, grids, cfg)
    trained = np.arange(case.tokens) >= case.pictures * each
    return examples.Example(ids, trained, positions, tuple(pictures))


def settings(work: Work) -> Settings:
    """Return the image loss's settings, as the stage has bound them."""
    return work.job.stage.loss.keywords["settings"]
