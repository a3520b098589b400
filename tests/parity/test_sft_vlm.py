"""The loss of VLM fine-tuning and all its gradients against PyTorch autograd on transformers.

The reference reads one conversation a row, padded; we read the same ones packed, from 8-bit pixels.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import FILLING, Step
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl.model import position_ids
from clvr_jax.models.qwen3_vl.processor import Picture
from clvr_jax.models.qwen3_vl.vision import Vision
from clvr_jax.sft.vlm import batches
from clvr_jax.sft.vlm import loss as losses
from clvr_jax.sft.vlm.examples import Example
from clvr_jax.tree import flatten
from tests.parity import vlm
from tests.parity.ours import carry
from tests.parity.reference import within

VALUE, GRADIENT = 1e-6, 1e-4
FAR = 300 * VALUE
LEVELS = np.tile((np.arange(256) / 127.5 - 1).astype(np.float32), (3, 1))
# tokens of text that the user and the assistant speak in turn, and pictures of the user's
ROWS = (
    (5, (4, 6), 4, 6, 3, (2, 4), 2, 5),
    (4, 3, 2, 7),
    ((6, 4), 3, 4, (2, 2), (4, 4), 1, 8),
    (9, 1),
)
PACKED = [[2, 3], [0, 1]]


@functools.cache
def conversations(patch: int) -> tuple[vlm.Batch, np.ndarray, list[np.ndarray]]:
    """The reference's batch, which tokens the assistant says, and 8-bit patches of each picture."""
    batch = vlm.batch(ROWS, patch, room=3)
    said = np.zeros(batch.ids.shape, bool)
    for row, parts in zip(said, ROWS, strict=True):
        start, speaks = 0, False
        for part, later in zip(parts, (*parts[1:], None)):
            stop = start + (part if isinstance(part, int) else part[0] * part[1] // 4 + 2)
            row[start:stop] = speaks and isinstance(part, int)
            # words that follow the user's last ones are the assistant's
            speaks = isinstance(part, int) and not speaks and isinstance(later, int)
            start = stop
    rng = np.random.default_rng(3)
    grey = [
        rng.integers(0, 256, (h * w, 3, patch * patch), dtype=np.uint8) for h, w in batch.all_grids
    ]
    frames = [np.repeat(LEVELS[0][x][:, :, None], 2, axis=2).reshape(len(x), -1) for x in grey]
    batch = vlm.Batch(batch.ids, batch.lengths, batch.grids, tuple(frames))
    return batch, said, [x.reshape(len(x), -1) for x in grey]


@functools.cache
def reference(name: str):
    """Loss and gradients in our layout by PyTorch, our config and our parameters."""
    toy = vlm.model(**vlm.MODELS[name])
    cfg, params = carry(toy)
    batch, said, _ = conversations(vlm.MODELS[name].get("patch", 4))
    toy = copy.deepcopy(toy).requires_grad_(True)
    labels = torch.from_numpy(np.where(said, batch.ids, -100)).long()
    loss = toy(**vlm.arguments(toy, batch), labels=labels, use_cache=False).loss
    loss.backward()
    for path, weight in toy.named_parameters():
        assert weight.grad is not None, path
        weight.data = weight.grad
    return loss.item(), carry(toy)[1], cfg, params


def examples(cfg, patch: int) -> list[Example]:
    """The same conversations as we read them."""
    batch, said, grey = conversations(patch)
    out, first = [], 0
    for ids, row, length, grids in zip(batch.ids, said, batch.lengths, batch.grids, strict=True):
        ids = ids[:length]
        positions, _ = position_ids(ids, list(grids), cfg)
        starts = np.flatnonzero(ids == vlm.START) + 1
        cut = [Picture(x, grid) for x, grid in zip(grey[first : first + len(grids)], grids)]
        first += len(grids)
        out.append(Example(ids, row[:length], positions, tuple(zip(starts.tolist(), cut))))
    return out


def rows(cfg, patch: int):
    """Our micro-batch: two conversations a row, with room to spare, and its shape."""
    table = np.full((1, len(PACKED), 3), FILLING)
    table[0, :, :2] = PACKED
    made = examples(cfg, patch)
    room = max(sum(len(made[i].ids) for i in row) for row in PACKED) + 5
    shape = Shape(room, 4, 32)
    batch = batches.make(Step(shape, table), made.__getitem__, cfg.vision)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch), shape


def mean_loss(cfg, shape, params, batch):
    networks = losses.Networks(LanguageModel(cfg.text), Vision(cfg.vision), chunk=16)
    frozen, key = {"levels": jnp.asarray(LEVELS)}, jax.random.key(0)
    total, weight, _ = losses.loss(params, {}, frozen, batch, key, shape, networks=networks)
    return total / weight


value = jax.jit(mean_loss, static_argnums=(0, 1))


@pytest.mark.parametrize("name", [pytest.param("grouped", marks=pytest.mark.slow), "one_kv_head"])
def test_loss_and_gradients(name):
    wanted, theirs, cfg, params = reference(name)
    batch, shape = rows(cfg, vlm.MODELS[name].get("patch", 4))
    run = jax.jit(jax.value_and_grad(mean_loss, argnums=2), static_argnums=(0, 1))
    mean, ours = run(cfg, shape, params, batch)
    assert within(VALUE, abs(float(mean) / wanted - 1))
    theirs, ours = flatten(theirs), flatten(ours)
    assert theirs.keys() == ours.keys()
    for path, leaf in theirs.items():
        assert within(GRADIENT, np.asarray(ours[path]), np.asarray(leaf)), path


def running(batch):
    """Positions that go on from one conversation to the next."""
    segments = np.asarray(batch["segments"])
    begins = np.diff(segments, axis=1, prepend=0) != 0
    steps = np.arange(segments.shape[1], dtype=np.int32)
    start = np.maximum.accumulate(np.where(begins, steps, 0), axis=1)
    return {"positions": batch["positions"] + start[..., None]}


def on_everything(batch):
    same = jnp.roll(batch["segments"], -1, axis=1) == batch["segments"]
    return {"weights": np.float32(same & (batch["segments"] > 0))}


MISTAKES = {
    "attention across conversations": lambda b: {"segments": jnp.minimum(b["segments"], 1)},
    "loss on the user's turns": on_everything,
    "loss on the token itself": lambda b: {"targets": b["ids"]},
    "loss on the token after the next": lambda b: {"targets": jnp.roll(b["targets"], -1, axis=1)},
    "weights not shifted": lambda b: {"weights": jnp.roll(b["weights"], 1, axis=1)},
    "pictures of another place": lambda b: {"pixels": jnp.roll(b["pixels"], 1, axis=1)},
    "one position for all axes": lambda b: {"positions": b["positions"][..., [0, 0, 0]]},
    "grey levels from 0 to 1": lambda b: {"pixels": b["pixels"] // 2 + 128},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(mistake):
    wanted, _, cfg, params = reference("grouped")
    batch, shape = rows(cfg, 4)
    wrong = value(cfg, shape, params, {**batch, **MISTAKES[mistake](batch)})
    assert abs(wrong / wanted - 1) > FAR


def test_missing_deepstack_shows(monkeypatch):
    wanted, _, cfg, params = reference("grouped")
    look = losses.look
    monkeypatch.setattr(losses, "look", lambda *args: look(*args).at[:, :, 1:].set(0))
    batch, shape = rows(cfg, 4)
    wrong = jax.jit(lambda params, batch: mean_loss(cfg, shape, params, batch))(params, batch)
    assert abs(wrong / wanted - 1) > FAR


def test_positions_are_relative():
    """Rotary angles see differences alone: a conversation may begin anywhere in text positions."""
    wanted, _, cfg, params = reference("grouped")
    batch, shape = rows(cfg, 4)
    other = running(batch)
    assert np.any(other["positions"] != batch["positions"])
    moved = value(cfg, shape, params, {**batch, **other})
    assert within(10 * VALUE, abs(float(moved / wanted) - 1))
