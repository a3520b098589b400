"""The image stage: the klein transformer on every picture of trajectories."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clvr_jax import parallel
from clvr_jax.data.buckets import Buckets
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.images import read_image
from clvr_jax.data.plan import FILLING, Epochs, Step, plan_groups
from clvr_jax.data.sources import open_source
from clvr_jax.data.validate import require_valid
from clvr_jax.diffusion.path import TimeSampling
from clvr_jax.generate import image as generation
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.sft.image import precompute as precomputing
from clvr_jax.sft.image.batches import Batches
from clvr_jax.sft.image.features import Features
from clvr_jax.sft.image.loss import Settings, loss
from clvr_jax.sft.image.pictures import read_pixels
from clvr_jax.sft.image.samples import Rules, Sample, index
from conversion.load import load
from conversion.sources import fingerprint
from launch import build, pictures
from launch.bench import flops
from launch.bench import image as sizes
from launch.training.select import selection
from launch.training.stage import Data, Stage, require_sizes


def find(config: Any) -> build.Weights:
    """Look at the weights of a config, without reading tensors.

    Raises:
      FileNotFoundError, ValueError: they are not there, or of other sizes than the config says.
    """
    weights = build.inspect_weights(config.weights)
    require_sizes(config, "transformer", weights.found.components["transformer"].variant)
    return weights


def networks(config: Any, weights: build.Weights | None) -> generation.Networks:
    """Return the networks as they train; without weights by the config's sizes.

    Raises:
      ValueError: an option is unknown.
    """
    nets = build.networks(weights, config.attention) if weights else _by_name(config.sizes)
    transformer = Transformer(
        nets.transformer.cfg,
        remat=config.remat,
        implementation=build.resolve_attention(config.attention),
    )
    return dataclasses.replace(nets, transformer=transformer)


def stage(config: Any, nets: generation.Networks, weights: build.Weights | None) -> Stage:
    """Return the stage; loading needs the weights."""
    abstract = build.abstract(nets, "float32")
    transformer = abstract.pop("transformer")
    others = {} if config.data.features else abstract
    settings = Settings(times(config), reference_noise=config.pictures.reference_noise)
    distilled = bool(weights and weights.distilled)

    def open_all() -> dict[str, Any]:
        parts = weights.found.components
        return {name: parts[name].open() for name in ("transformer", *others)}

    return Stage(
        name="image",
        component="transformer",
        abstract=transformer,
        stacked=flux2.STACKED,
        others=others,
        loss=functools.partial(loss, networks=nets, settings=settings),
        open=open_all,
        constants={},
        record={
            "conditioning": json.loads(policy(config).to_json()),
            "pattern": config.pictures.pattern,
            "distilled": distilled,
        },
    )


def times(config: Any) -> TimeSampling:
    """Return at which noise levels the transformer is trained.

    Raises:
      ValueError: a value is unknown.
    """
    given = config.times.to_dict()
    with contextlib.suppress(ValueError):  # a word or a number, and a config's types are fixed
        given["shift"] = float(given["shift"])
    return TimeSampling(**given)


def policy(config: Any) -> Policy:
    """Return how a trajectory becomes the image model's text and references.

    Raises:
      ValueError: a value is unknown.
    """
    given = config.condition.to_dict()
    given["last_k"] = given["last_k"] or None
    return Policy.from_json(given)


def rules(config: Any, nets: generation.Networks) -> Rules:
    """Return what is learnt from what.

    Raises:
      ValueError: a value is unknown.
    """
    areas = tuple(config.pictures.areas)
    buckets = Buckets(areas=areas, factor=nets.vae.cfg.factor)

    pattern, rejected = config.pictures.pattern, config.pictures.rejected
    return Rules(policy(config), buckets, pattern=pattern, rejected=rejected)


def data(
    path: str,
    config: Any,
    nets: generation.Networks,
    weights: build.Weights,
    rows: int,
    process: tuple[int, int],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    validation: bool = False,
) -> Data:
    """Check a dataset, and plan what every step reads.

    Args:
      path: the dataset.
      config: of the stage.
      nets, weights: from above.
      rows: of a micro-batch, over all devices.
      process: which rows this process reads.
      epochs, steps: length of the run, one of them.
      validation: no dropout, and micro-batches one at a time.

    Raises:
      InvalidData: faults, each with file and line.
      ValueError: samples that do not fit.
    """
    require_valid(path)
    source, tokenizer = open_source(path), build.load_tokenizer(weights.found.shared["tokenizer"])
    applied = rules(config, nets)
    samples = index(source, tokenizer, applied, threads=max(config.data.threads, 1))
    keys = [sample.static for sample in samples]
    accumulation = 1 if validation else config.batch.accumulation
    plan = lambda epoch: plan_groups(keys, accumulation, rows, config.seed, epoch)
    make = Batches(
        source,
        samples,
        tokenizer,
        applied,
        seed=config.seed,
        dropout=0.0 if validation else config.dropout,
        features=features(config, nets, weights) if config.data.features else None,
        process=process,
    )
    return Data(
        path=path,
        records=len(source),
        fingerprint=source.fingerprint,
        steps=Epochs(plan, epochs=epochs, steps=steps),
        make=make,
        counts=lambda step: {"images": float((step.rows != FILLING).sum())},
        flops=functools.partial(_flops, config, nets),
        describe=lambda step: _describe(source, samples, applied, step),
    )


def features(config: Any, nets: generation.Networks, weights: build.Weights) -> Features:
    """Return the folder of precomputed features of these encoders."""
    parts = weights.found.components
    prints = {
        name: fingerprint(parts[name].open(), parts[name].abstract(), parts[name].stacked)
        for name in ("text_encoder", "vae")
    }
    dtype = np.float32 if config.precision == "float32" else "bfloat16"
    return Features(config.data.features, nets, **prints, dtype=dtype)


def precompute(
    config: Any,
    nets: generation.Networks,
    weights: build.Weights,
    data: Data,
    mesh: Any,
    process: tuple[int, int],
    say: Any,
) -> None:
    """Make the text features and latents that a dataset needs and that are not there yet.

    Raises:
      WeightsError: the disk has too little room; nothing was made.
      ValueError: a process does not hold the encoders in full.
    """
    made: Any = data.make
    args = (made.source, list(made.samples), made.tokenizer, made.rules)
    work = precomputing.missing(
        made.features,
        *args,
        empty=made.dropout > 0,
        threads=max(config.data.threads, 1),
        part=process,
    )
    if not work.items:
        return
    if mesh is not None and jax.process_count() > 1:
        raise ValueError(
            f"{config.data.features} lacks {len(work.items)} features, which one process makes on "
            "its own devices: run this command there with --config.steps=1 and another --workdir"
        )
    shapes = build.abstract(nets, "float32")
    parts = weights.found.components
    frozen = {}
    for name in ("text_encoder", "vae"):
        places = None if mesh is None else parallel.shardings(shapes[name], mesh)
        dtype = made.features.dtype
        frozen[name] = load(parts[name].open(), shapes[name], parts[name].stacked, places, dtype)
    with build.use_mesh(mesh):
        precomputing.make(made.features, work, nets, frozen, made.rules.buckets.factor, say=say)


def nominal(config: Any, nets: generation.Networks, rows: int) -> Step:
    """Return a step of the config's sizes: the longest text, one reference, every row full."""
    side = round((max(config.pictures.areas) ** 0.5) / nets.vae.cfg.factor)
    layout = Layout(
        max(config.condition.buckets),
        (side, side),
        ((side, side),),
        pattern=config.pictures.pattern,
    )
    return Step(layout, np.zeros((config.batch.accumulation, rows), np.int64))


def shapes(config: Any, nets: generation.Networks, step: Step) -> dict[str, Any]:
    """Return the arrays of a step as shapes, as `Batches` makes them from pictures."""
    layout, factor, lead = step.static, nets.vae.cfg.factor, step.rows.shape
    array = lambda dtype, *axes: jax.ShapeDtypeStruct((*lead, *axes), dtype)
    size = lambda tokens: (tokens[0] * factor, tokens[1] * factor, 3)
    return {
        "weights": array(np.float32),
        "ids": array(np.int32, layout.text),
        "lengths": array(np.int32),
        "pixels": array(np.uint8, *size(layout.noise)),
        "reference_pixels": [array(np.uint8, *size(tokens)) for tokens in layout.references],
    }


def previews(
    config: Any, nets: generation.Networks, weights: build.Weights, data: Data, writes: bool
) -> Any:
    """Return what draws samples of a dataset under their conditions, and prompts; None for none.

    It is called with (parameters, adapters, others, steps done, folder), writes files and returns
    pictures by name.

    Args:
      config: of the stage.
      nets, weights: from above.
      data: whose first samples are drawn, from `data`.
      writes: whether this process writes files.
    """
    make: Any = data.make
    applied, factor = make.rules, nets.vae.cfg.factor
    side = round(max(config.pictures.areas) ** 0.5 / factor) * factor
    chosen: list[tuple[str, list[np.ndarray], generation.Settings, Sample | None]] = []
    settings = functools.partial(
        generation.Settings,
        steps=config.preview.steps,
        guidance=config.preview.guidance,
        pattern=config.pictures.pattern,
    )
    for sample in list(make.samples)[: config.preview.samples]:
        inputs = applied.inputs(make.source[sample.trajectory], sample.step)
        references = [
            read_pixels(picture, factor).astype(np.float32) / 127.5 - 1
            for picture in inputs.references
        ]
        height, width = inputs.target.size
        asked = settings(height=height, width=width, text_tokens=sample.static.text)
        chosen.append((inputs.text, references, asked, sample))
    for prompt in config.preview.prompts:
        asked = settings(height=side, width=side, text_tokens=min(config.condition.buckets))
        chosen.append((prompt, [], asked, None))

    def draw(params, adapters, others, step: int, folder: Path) -> dict[str, Any]:
        tokenizer = make.tokenizer
        model = generation.ImageModel(nets, {**others, "transformer": params}, tokenizer, adapters)
        drawn = {}
        for number, (prompt, references, asked, sample) in enumerate(chosen):
            seed = config.preview.seed + number
            (image,) = generation.generate(model, [prompt], references, [seed], asked)[0]
            drawn[f"preview/{number}"] = image
            if not writes:
                continue
            told = {"prompt": prompt, "seed": seed, "step": step}
            pictures.write_png(folder / f"{step:07d}-{number}.png", image, told)
            if sample is not None and not (folder / f"target-{number}.png").exists():
                picture = applied.inputs(make.source[sample.trajectory], sample.step).target
                pictures.write_png(
                    folder / f"target-{number}.png", read_pixels(picture, factor), told
                )
        return drawn

    return draw if chosen else None


def _describe(source: Any, samples: list[Sample], applied: Rules, step: Step) -> str:
    first = samples[int(step.rows.flat[0])]
    inputs = applied.inputs(source[first.trajectory], first.step)
    place = f"{source.where(first.trajectory)}, image {first.step + 1}"
    lines = [f"first row: {place}, {step.static}", f"text: {inputs.text}"]
    for name, picture in (
        ("target", inputs.target),
        *(("reference", p) for p in inputs.references),
    ):
        read_image(picture.image)  # that it decodes
        lines.append(f"{name}: {picture.image}, {picture.size[1]} x {picture.size[0]}")
    return "\n".join(lines)


def _flops(config: Any, nets: generation.Networks, step: Step) -> float:
    each = flops.train_image(
        nets.transformer.cfg,
        nets.text_encoder.cfg,
        nets.vae.cfg,
        step.static,
        precomputed=bool(config.data.features),
        share=selection(config).share,
    )
    return float(each * (step.rows != FILLING).sum())


def _by_name(name: str) -> generation.Networks:
    if name not in sizes.MODELS:
        known = ", ".join(sizes.MODELS)
        raise ValueError(f"sizes is {name!r} and there are no weights; choose from {known}")
    return sizes.networks(name)
