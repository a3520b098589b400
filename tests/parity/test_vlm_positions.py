"""Positions along time, height and width against transformers' get_rope_index."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.models.qwen3.decoder import angles
from clvr_jax.models.qwen3_vl.config import VARIANTS
from clvr_jax.models.qwen3_vl.model import position_ids
from tests.parity import vlm
from tests.parity.reference import relative_error, within
from tests.parity.test_vlm import conversations, pair


def layout(rng: np.random.Generator) -> tuple[vlm.Part, ...]:
    """A random conversation: text around up to five images of up to 6 x 6 cells."""
    parts: list[vlm.Part] = [int(rng.integers(0, 6))]
    for _ in range(rng.integers(0, 6)):
        parts += [tuple(int(x) for x in 2 * rng.integers(1, 7, 2)), int(rng.integers(0, 6))]
    return (*parts, 1)


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts(seed):
    """Positions, the next position, and the reference's delta = next - unpadded tokens."""
    model, cfg, _ = pair("grouped")
    rng = np.random.default_rng(seed)
    batch = vlm.batch([layout(rng) for _ in range(4)], 2, room=int(rng.integers(0, 4)), seed=seed)
    theirs, deltas = vlm.rope_index(model, batch)
    for row, (length, grids) in enumerate(zip(batch.lengths, batch.grids, strict=True)):
        ours, following = position_ids(batch.ids[row, :length], list(grids), cfg)
        assert ours.shape == (length, 3)
        assert (ours == theirs[row, :length]).all()
        assert following == ours.max() + 1
        assert following - length == deltas[row]


def test_worked_example():
    """Section 2.4 of reference/qwen3_vl.md, with the released token ids."""
    cfg = VARIANTS["qwen3_vl_8b"]
    image = lambda cells: [cfg.vision_start, *[cfg.image_token] * cells, cfg.vision_end]
    tokens = np.array([1, 2, 3, *image(6), *image(8), 4, 5])
    positions, following = position_ids(tokens, [(4, 6), (8, 4)], cfg)
    time = [0, 1, 2, 3, *[4] * 6, 7, 8, *[9] * 8, 13, 14, 15]
    height = [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 15]
    width = [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, *[9, 10] * 4, 13, 14, 15]
    assert positions.T.tolist() == [time, height, width]
    assert following == 16
    assert following - len(tokens) == -7


@pytest.mark.parametrize("seed", range(20))
def test_part_by_part_equals_whole(seed):
    """A conversation grows by turns; each goes on where the previous one stopped."""
    _, cfg, _ = pair("grouped")
    rng = np.random.default_rng(seed)
    turns = [layout(rng) for _ in range(3)]
    lines = [vlm.tokens(parts, rng) for parts in turns]
    grids = [[part for part in parts if not isinstance(part, int)] for parts in turns]
    whole, following = position_ids(np.concatenate(lines), [*itertools.chain(*grids)], cfg)
    at, parts = 0, []
    for line, own in zip(lines, grids, strict=True):
        positions, at = position_ids(line, own, cfg, start=at)
        parts.append(positions)
    assert (np.concatenate(parts) == whole).all()
    assert at == following


def test_start_moves_every_axis():
    _, cfg, _ = pair("grouped")
    batch = conversations("grouped", (vlm.CONVERSATIONS["two images"],))
    here, following = position_ids(batch.ids[0], list(batch.grids[0]), cfg)
    there, later = position_ids(batch.ids[0], list(batch.grids[0]), cfg, start=11)
    assert (there == here + 11).all()
    assert later == following + 11


def test_nothing():
    _, cfg, _ = pair("grouped")
    positions, following = position_ids(np.zeros(0, np.int32), [], cfg, start=7)
    assert positions.shape == (0, 3)
    assert following == 7


@pytest.mark.parametrize(
    ("parts", "grids", "message"),
    [
        ((3, (4, 6), 2), [], "beyond the 0 given images"),
        (((4, 6), (2, 2)), [(4, 6)], "beyond the 1 given images"),
        ((3, (4, 6), 2), [(4, 6), (2, 2)], "1 of 2 images have no image tokens"),
        ((9,), [(2, 2)], "1 of 1 images have no image tokens"),
        ((3, (4, 6), 2), [(4, 8)], "2 x 4 cells needs 8 image tokens from token 4 on, found 6"),
        ((3, (4, 6), 2), [(4, 4)], "beyond the 1 given images"),
    ],
)
def test_images_that_are_not_there(parts, grids, message):
    _, cfg, _ = pair("grouped")
    with pytest.raises(ValueError, match=message):
        position_ids(vlm.tokens(parts, np.random.default_rng(0)), grids, cfg)


def test_tokens_end_within_an_image():
    _, cfg, _ = pair("grouped")
    line = vlm.tokens((3, (4, 6)), np.random.default_rng(0))[:-3]
    with pytest.raises(ValueError, match="needs 6 image tokens from token 4 on, found 4"):
        position_ids(line, [(4, 6)], cfg)


@pytest.mark.parametrize("name", vlm.MODELS)
def test_every_frequency_turns_with_its_axis(name):
    """Far positions, at which the slowest frequencies of the released ratio show, too."""
    model, cfg, _ = pair(name)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, [[[20_000, 100, 300]]], (2, 9, 3)).astype(np.int32)
    positions[1, :, 0] += 240_000
    rotary = model.model.language_model.rotary_emb
    given = torch.from_numpy(positions).long().permute(2, 0, 1)
    theirs = [x[..., : cfg.text.head_width // 2].numpy() for x in rotary(torch.zeros(1), given)]
    turned = lambda turns: np.stack([np.cos(turns), np.sin(turns)])
    # at such positions the last bit of a frequency is 0.01 of an angle
    assert within(0.02, turned(angles(jnp.asarray(positions), cfg.text)), np.stack(theirs))
    count = np.arange(cfg.text.head_width // 2)
    contiguous = np.repeat(np.arange(3), cfg.text.mrope_section)
    # what the sections leave follows time: time, height, width repeated to the end is not the same
    for wrong in (contiguous, *([count % 3] if name == "one_kv_head" else [])):
        turns = positions[..., wrong] * rotary.inv_freq.numpy()
        assert relative_error(turned(turns), np.stack(theirs)) > 0.1
