"""The stages that make the miniature's networks from nothing, on data drawn as they are needed."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clvr_jax.data.conditioning import Policy
from clvr_jax.data.plan import Epochs, Step
from clvr_jax.generate import image as generation
from clvr_jax.miniature import autoencoder
from clvr_jax.miniature.batches import DrawingBatches, crowds
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.render import SIDE, keys, render
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3.decoder import Decoder
from clvr_jax.sft.image import loss as sft
from conversion.load import load
from conversion.sources import Together, fingerprint
from launch import build
from launch.bench import flops
from launch.training import image
from launch.training.image import find
from launch.training.stage import Data, Stage

__all__ = ["data", "find", "networks", "stage"]

LAYERS = 8  # traced at once: loops over such small layers cost a fifth of the time
_KLEIN = ("transformer", "text_encoder")  # trained together
_TASKS = ("prompts", "edits", "brings")  # with no, one and two references
_WHOLE = 0.05  # share of the VAE's steps that see whole pictures
_VERSION = 4  # of what the samples are; another one is other data


def networks(config: Any, weights: build.Weights) -> generation.Networks:
    """Return the networks as they train; see `image.networks`."""
    nets = image.networks(config, weights)
    fields = {"implementation": nets.transformer.implementation, "scan": LAYERS}
    transformer = Transformer(nets.transformer.cfg, remat=config.remat, **fields)
    return dataclasses.replace(
        nets, transformer=transformer, text_encoder=Decoder(nets.text_encoder.cfg, **fields)
    )


def stage(config: Any, nets: generation.Networks, weights: build.Weights) -> Stage:
    """Return the stage of the VAE, or of klein without it."""
    shapes, parts = build.abstract(nets, "float32"), weights.found.components
    common = dict(name=config.stage, constants={})
    if config.stage == "world_vae":
        return Stage(
            component="vae",
            abstract=shapes["vae"],
            stacked=(),
            others={},
            loss=functools.partial(autoencoder.loss, vae=nets.vae),
            open=lambda: {"vae": parts["vae"].open()},
            record={},
            **common,
        )
    roots = {"transformer": flux2.STACKED, "text_encoder": qwen3.STACKED}
    name = "+".join(_KLEIN)
    settings = sft.Settings(image.times(config), text_gradient=True)
    conditioning = Policy(text="instruction", references="chosen", buckets=tuple(config.text))

    def open_all() -> dict[str, Any]:
        return {name: Together({part: parts[part].open() for part in _KLEIN})}

    return Stage(
        component=name,
        abstract={part: shapes[part] for part in _KLEIN},
        stacked=tuple(f"{part}/{root}" for part in _KLEIN for root in roots[part]),
        others={},
        loss=functools.partial(klein_loss, networks=nets, settings=settings),
        open=open_all,
        record={"conditioning": json.loads(conditioning.to_json())},
        **common,
    )


def klein_loss(
    params: Any,
    adapters: Any,
    frozen: Any,
    batch: Mapping[str, Any],
    key: Any,
    static: Layout,
    *,
    networks: generation.Networks,
    settings: sft.Settings,
) -> Any:
    """Return the image stage's loss, with a gradient of the text encoder too.

    Args:
      params: `transformer` and `text_encoder`.
      adapters: of the transformer.
      frozen: not used.
      batch: rows of `DrawingBatches`.
      key: of noise and its levels.
      static: what the sequence holds.
      networks: bound before training, as are
      settings: what is asked.
    """
    text = sft.encode_text(networks, params["text_encoder"], batch["ids"], batch["lengths"])
    given = {name: batch[name] for name in ("weights", "latents", "reference_latents")}
    return sft.loss(
        params["transformer"],
        adapters,
        frozen,
        {**given, "text": text},
        key,
        static,
        networks=networks,
        settings=settings,
    )


def data(
    split: str,
    config: Any,
    nets: generation.Networks,
    weights: build.Weights,
    rows: int,
    process: tuple[int, int],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    validation: bool = False,
) -> Data:
    """Plan what every step draws.

    Args:
      split: of the world; pictures for the VAE have none, and are drawn for training alone.
      config: of the stage.
      nets, weights: from above.
      rows: of a micro-batch, over all devices.
      process: which rows this process draws.
      steps: length of the run.
      epochs: for validation, which is one round of tasks; a run has none.
      validation: no dropout, and micro-batches one at a time.

    Raises:
      ValueError: the split is unknown, tasks or text lengths are not as `DrawingBatches` wants
        them, or there is no number of steps.
    """
    known = [each.value for each in Split]
    if split not in known:
        raise ValueError(f"data is {split!r}; these stages draw it: choose from {', '.join(known)}")
    if not validation:
        require_steps(steps)
    accumulation, mark = 1 if validation else config.batch.accumulation, ""
    length: dict[str, int] = {"steps": steps} if steps else {"epochs": 1}
    if config.stage == "world_vae":
        if split != "train" or validation:
            raise ValueError(
                f"data is {split!r}; the VAE's pictures are of no split: give "
                "--config.data.train=train and no --config.data.validation"
            )
        numbers = np.arange(accumulation * rows).reshape(accumulation, rows)
        # a round has one step: first corners of pictures, which cost a quarter, then whole ones
        whole = round((1 - _WHOLE) * steps)
        side = lambda epoch: SIDE if epoch >= whole else SIDE // 2
        plan: Callable[[int], list[Step]] = lambda epoch: [Step(side(epoch), numbers)]
        make: Callable[[Step], Any] = functools.partial(crowds, seed=config.seed, process=process)
        each = lambda step: _vae_flops(nets, step.static)
    else:
        tokenizer = build.load_tokenizer(weights.found.shared["tokenizer"])
        tasks = tuple(config.tasks[name] for name in _TASKS)
        dropout = 0.0 if validation else config.dropout
        vae, mark = encoder(nets, weights)
        make = DrawingBatches(
            tokenizer,
            vae,
            Split(split),
            tuple(config.text),
            tasks,
            accumulation,
            rows,
            config.seed,
            dropout,
            process,
        )
        plan, each = make.plan, functools.partial(_klein_flops, nets)
    return endless(
        split,
        fingerprint=f"world {_VERSION} {split} seed {config.seed} {mark}".strip(),
        steps=Epochs(plan, **length),
        make=make,
        unit="images",
        row_flops=each,
    )


def require_steps(steps: int | None) -> None:
    """Refuse a run whose length is not given in steps."""
    if not steps:
        raise ValueError("data never repeat, so that there are no epochs; give --config.steps")


def endless(
    split: str,
    *,
    fingerprint: str,
    steps: Epochs,
    make: Callable[[Step], Any],
    unit: str,
    row_flops: Callable[[Step], float],
) -> Data:
    """Return data that are drawn as they are needed: a row is its number.

    Args:
      split: of the world.
      fingerprint: the same just for the same data.
      steps: what each step holds.
      make: makes the batch of a step.
      unit: what a row is, for reports of progress.
      row_flops: of a row of a step.
    """
    return Data(
        path=f"world:{split}",
        records=0,
        fingerprint=fingerprint,
        steps=steps,
        make=make,
        counts=lambda step: {unit: float(step.rows.size)},
        flops=lambda step: float(row_flops(step) * step.rows.size),
        describe=lambda step: f"first row: number {step.rows.flat[0]} of round {step.epoch}",
    )


def encoder(nets: generation.Networks, weights: build.Weights) -> tuple[Callable[..., Any], str]:
    """Return the encoder of pictures given as codes and seeds, and the fingerprint of its VAE.

    It is a program of its own: as a part of the step it would be compiled for each layout.
    """
    part = weights.found.components["vae"]
    params = load(part.open(), part.abstract(), ())

    @jax.jit
    def encode(codes, seeds):
        return sft.encode_pictures(nets, params, [render(codes, keys(seeds))])[0]

    return encode, fingerprint(part.open(), part.abstract(), ())


def _vae_flops(nets: generation.Networks, side: int) -> int:
    """Training on one picture: forward, and twice as much backward."""
    cfg = nets.vae.cfg
    return 3 * (flops.vae_encode(cfg, side, side) + flops.vae_decode(cfg, side, side))


def _klein_flops(nets: generation.Networks, step: Step) -> int:
    """Training on one picture; the VAE runs forward only."""
    cfg, text = nets.transformer.cfg, nets.text_encoder.cfg
    seen = flops.train_image(cfg, text, nets.vae.cfg, step.static)
    return seen + 2 * flops.text_encoder(text, step.static.text)
