"""The VLM stage: Qwen3-VL on whole trajectories."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax import lora
from clvr_jax.backends.local import LocalVlm
from clvr_jax.backends.protocol import Options, user
from clvr_jax.data.packing import Shape, Size, plan_packed
from clvr_jax.data.plan import FILLING, Epochs, Step
from clvr_jax.data.sources import open_source
from clvr_jax.data.validate import require_valid
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl import model, processor
from clvr_jax.models.qwen3_vl.vision import Vision
from clvr_jax.sft.vlm import batches, examples
from clvr_jax.sft.vlm.loss import Networks, loss
from conversion.components import Component
from launch import build, build_vlm, pictures
from launch.bench import flops
from launch.training.select import selection
from launch.training.stage import Data, Stage, require_sizes


def find(config: Any) -> Component:
    """Look at the weights of a config, without reading tensors.

    Raises:
      FileNotFoundError, ValueError: they are not there, or of other sizes than the config says.
    """
    found = build_vlm.find(config.weights)
    if found.name != "vlm":
        raise ValueError(f"{config.weights} is a {found.name}; this stage trains a Qwen3-VL")
    require_sizes(config, "Qwen3-VL", found.variant)
    return found


def networks(config: Any, weights: Component | None) -> Networks:
    """Return the networks as they train; without weights by the config's sizes.

    Raises:
      ValueError: an option is unknown.
    """
    cfg = _sizes(config, weights)
    fields = {
        "remat": config.remat,
        "implementation": build.resolve_attention(config.attention),
    }
    return Networks(
        LanguageModel(cfg.text, **fields),
        Vision(cfg.vision, **fields),
        train_vision=selection(config).trains(model.abstract_params(cfg), "visual"),
        chunk=config.chunk,
    )


def stage(config: Any, nets: Networks, weights: Component | None) -> Stage:
    """Return the stage; loading needs the weights."""
    cfg = _sizes(config, weights)
    channels = cfg.vision.in_channels
    levels = np.zeros((channels, 256), np.float32)
    if weights is not None:
        levels = reader(config, weights).levels()
    return Stage(
        name="vlm",
        component="vlm",
        abstract=model.abstract_params(cfg),
        stacked=qwen3_vl.STACKED,
        others={},
        loss=functools.partial(loss, networks=nets),
        open=lambda: {"vlm": weights.open()},
        constants={"levels": levels},
        record={"template": config.template.to_dict()},
    )


def reader(config: Any, weights: Component) -> processor.Processor:
    """Return the processor of the weights."""
    return processor.load(weights.folder, weights.config.vision, **config.template.to_dict())


def positions(config: Any, weights: Component) -> int:
    """Return over how many positions conversations are spread (`examples.spread`); 0: over none.

    Raises:
      ValueError: they are fewer than the tokens of a row, or more than the weights have.
    """
    given, tokens = config.data.positions, config.data.tokens
    most = weights.config.text.max_positions
    if given and not tokens <= given <= most:
        raise ValueError(
            f"data.positions is {given}; give the {tokens} of data.tokens at least and the {most} "
            "that the weights have at most, or 0 for conversations as they are"
        )
    return given


def data(
    path: str,
    config: Any,
    nets: Networks,
    weights: Component,
    rows: int,
    process: tuple[int, int],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    validation: bool = False,
) -> Data:
    """Check a dataset, and plan what every step reads; see `launch.training.image.data`.

    Raises:
      InvalidData: faults, each with file and line.
      ValueError: a conversation that does not fit into a row, or that the template refuses; or see
        `positions`.
    """
    room = 0 if validation else positions(config, weights)
    require_valid(path)
    source, reads, cfg = open_source(path), reader(config, weights), weights.config
    messages = lambda i: source[i].messages()
    threads = max(config.data.threads, 1)
    measured = examples.sizes(len(source), messages, reads, cfg, threads=threads)
    plan = lambda epoch: plan_packed(
        measured,
        config.data.tokens,
        1 if validation else config.batch.accumulation,
        rows,
        config.seed,
        epoch,
        most_images=None if config.data.images < 0 else config.data.images,
        names=[source.where(i) for i in range(len(source))],
    )
    read = lambda i: examples.encode(messages(i), reads, cfg)

    def apart(step: Step, i: int) -> examples.Example:
        rng = np.random.default_rng((config.seed, step.epoch, i))
        return examples.spread(read(i), rng, room)

    return Data(
        path=path,
        records=len(source),
        fingerprint=source.fingerprint,
        steps=Epochs(plan, epochs=epochs, steps=steps),
        make=lambda step: batches.make(step, functools.partial(apart, step), cfg.vision, process),
        counts=lambda step: _counts(measured, step),
        flops=lambda step: _flops(config, nets, measured, step),
        describe=lambda step: _describe(source, reads, cfg, read, step),
    )


def nominal(config: Any, nets: Networks, rows: int) -> Step:
    """Return a step of the config's sizes: rows full of tokens, four pictures of 1024 x 1024."""
    cell = nets.vision.cfg.cell
    images = 4 if config.data.images < 0 else config.data.images
    patches = min(4096, config.data.tokens * cell // (2 * max(images, 1)))
    shape = Shape(config.data.tokens, images, patches // 64 * 64)
    return Step(shape, np.zeros((config.batch.accumulation, rows, 1), np.int64))


def shapes(config: Any, nets: Networks, step: Step) -> dict[str, Any]:
    """Return the arrays of a step as shapes."""
    row = batches.empty((1, 1), step.static, nets.vision.cfg)
    lead = step.rows.shape[:2]
    shape = lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[2:]), x.dtype)
    return {name: shape(x) for name, x in row.items()}


def previews(
    config: Any, nets: Networks, weights: Component, data: Data, mesh: Any, writes: bool
) -> Any:
    """Return what writes the model's greedy answers to the first goals of a dataset; None for none.

    It is called as that of `launch.training.image.previews`. With several processes there are none,
    and this says so: what schedules conversations is one process's.
    """
    if jax.process_count() > 1:
        if writes:
            print("several processes: previews of text are not written", file=sys.stderr)
        return None
    source = open_source(data.path)
    goals = [source[i].goal for i in range(min(config.preview.samples, len(source)))]
    reads, cfg = reader(config, weights), weights.config
    serving = build_vlm.networks(cfg, config.attention)

    def answer(params, adapters, others, step: int, folder: Path) -> dict[str, Any]:
        # copies: serving lays parameters out anew, and frees what it is given
        params = jax.tree.map(jnp.copy, params)
        if adapters:
            params = lora.merge(params, adapters)
        vlm = LocalVlm(
            "preview",
            serving,
            build_vlm.prepare(cfg, params, mesh),
            reads,
            cfg,
            context=min(config.data.tokens, cfg.text.max_positions),
            mesh=mesh,
        )
        options = Options(max_tokens=config.preview.tokens, temperature=0.0)
        try:
            waiting = [vlm.start().submit([user(goal)], options) for goal in goals]
            texts = [pending.result().text for pending in waiting]
        finally:
            vlm.close()
        if writes:
            shown = "\n\n".join(f"# {goal}\n\n{text}" for goal, text in zip(goals, texts))
            pictures.write_text(folder / f"{step:07d}.md", shown + "\n")
        return {}

    return answer if goals else None


def _describe(source, reads, cfg, read, step: Step) -> str:
    first = step.rows[0, 0]
    lines = []
    for i in first[first != FILLING].tolist():
        example = read(i)
        trained = reads.tokenizer.decode(example.ids[example.trained])
        lines += [
            f"first row: {source.where(i)}, {len(example.ids)} tokens, "
            f"{int(example.trained.sum())} of them trained, {len(example.pictures)} images "
            + ", ".join(f"{16 * p.grid[1]} x {16 * p.grid[0]}" for _, p in example.pictures),
            reads.decode(example.ids),
            f"trained: {trained}",
        ]
    return "\n".join(lines)


def _counts(measured: list[Size], step: Step) -> dict[str, float]:
    inside = step.rows[step.rows != FILLING]
    return {
        "tokens": float(sum(measured[i].tokens for i in inside)),
        "conversations": float(len(inside)),
    }


def _flops(config: Any, nets: Networks, measured: list[Size], step: Step) -> float:
    rows = step.rows.reshape(-1, step.rows.shape[-1])
    total = 0
    for row in rows:
        held = [measured[i] for i in row[row != FILLING]]
        total += flops.train_vlm(
            nets.language.cfg,
            nets.vision.cfg,
            [size.tokens for size in held],
            [size.patches for size in held for _ in range(size.images)],
            train_vision=nets.train_vision,
            share=selection(config).share,
        )
    return float(total)


def _sizes(config: Any, weights: Component | None) -> qwen3_vl.Qwen3VLConfig:
    if weights is not None:
        return weights.config
    if config.sizes not in qwen3_vl.VARIANTS:
        known = ", ".join(qwen3_vl.VARIANTS)
        raise ValueError(f"sizes is {config.sizes!r} and there are no weights; choose from {known}")
    return qwen3_vl.VARIANTS[config.sizes]
