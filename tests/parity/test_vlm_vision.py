"""The vision tower against transformers' Qwen3VLVisionModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from clvr_jax.models.layers import unstack
from clvr_jax.models.qwen3_vl import vision
from tests.parity import vlm
from tests.parity.ours import carry, image_features, vision_program
from tests.parity.reference import relative_error, within
from tests.parity.test_vlm import TOLERANCE, conversations, pair

# wide, high, square, one cell, one row of cells, larger than the table of positions
GRIDS = ((4, 6), (10, 2), (4, 4), (2, 2), (2, 8), (6, 4))


def pictures(name: str, grids=GRIDS, seed: int = 0) -> vlm.Batch:
    """Images with patches of a model's size, in one row."""
    return vlm.batch([grids], vlm.MODELS[name].get("patch", 4), seed=seed)


@pytest.mark.parametrize("name", vlm.MODELS)
def test_features(name):
    """The main features and each of DeepStack's; ours are padded images, theirs packed ones."""
    model, cfg, params = pair(name)
    batch = pictures(name)
    ours = image_features(cfg, params, batch, patches=28)
    assert ours.shape == (len(GRIDS), 7, 1 + len(cfg.vision.deepstack), cfg.text.width)
    for own, theirs, (rows, cols) in zip(ours, vlm.features(model, batch), GRIDS, strict=True):
        for part in range(theirs.shape[1]):
            assert 0.3 < theirs[:, part].std() < 3, "the toy model is degenerate"
            assert within(TOLERANCE, own[: rows * cols // 4, part], theirs[:, part])


def test_padding_and_neighbours_do_not_matter():
    """An image alone, without padding, among others, and in unrolled blocks."""
    _, cfg, params = pair("grouped")
    batch = pictures("grouped")
    among = image_features(cfg, params, batch, patches=28)
    alone = image_features(cfg, params, pictures("grouped", GRIDS[:1]))
    assert within(TOLERANCE, alone[0], among[0, :6])
    roots = ["blocks", "deepstack_merger_list"]
    apart = unstack(jax.tree.map(jnp.copy, params["visual"]), roots)
    places = vision.places(list(GRIDS), cfg.vision, 28)
    pixels = np.zeros((len(GRIDS), 28, 96), np.float32)
    for place, image in zip(pixels, batch.pixels, strict=True):
        place[: len(image)] = image
    unrolled = vision_program(cfg.vision, scan=False)({"params": apart}, pixels, places)
    assert within(TOLERANCE, unrolled, among)


def test_one_frame_of_a_still_is_enough():
    """768 numbers of a released patch give what 1536 do."""
    model = vlm.model(patch=16, blocks=1, deepstack=(0,))
    cfg, params = carry(model)
    batch = vlm.batch([[(4, 6)]], 16)
    run = vision_program(cfg.vision)
    places = vision.places([(4, 6)], cfg.vision)
    frames = batch.pixels[0].reshape(1, 24, 3, 2, 256)
    assert (frames[:, :, :, 0] == frames[:, :, :, 1]).all()
    both, one = frames.reshape(1, 24, 1536), frames[:, :, :, 0].reshape(1, 24, 768)
    both, one = (run({"params": params["visual"]}, pixels, places) for pixels in (both, one))
    assert within(TOLERANCE, one, both)
    assert within(TOLERANCE, one[0], vlm.features(model, batch)[0])


def test_frames_that_differ():
    """A patch of two different frames, as videos have: both kernels count."""
    model, cfg, params = pair("grouped")
    batch = pictures("grouped")
    for i, pixels in enumerate(batch.pixels):
        still = pixels.reshape(len(pixels), 3, 2, 16)
        still[:, :, 1] = vlm.pictures(len(pixels), 4, 50 + i).reshape(still.shape)[:, :, 0]
    ours = image_features(cfg, params, batch, patches=28)
    for own, theirs in zip(ours, vlm.features(model, batch), strict=True):
        assert within(TOLERANCE, own[: len(theirs)], theirs)


@pytest.mark.parametrize("side", [4, 7, 48])
def test_taps_and_weights_of_every_size(side):
    """The reference's lookup and places, from images of one cell to large ones."""
    cfg = vision.VisionConfig(24, 1, 2, 36, 4, 2, 2, 32, side**2, ())
    sizes = [2, 4, 6, 8, 10, 14, 16, 18, 48, 50, 84]
    rng = np.random.default_rng(side)
    table = rng.standard_normal((side**2, 8))
    look_up = lambda taps, weights: np.einsum("ptd,pt->pd", table[taps], weights)
    grids = [(rows, int(rng.choice(sizes))) for rows in sizes]
    for grid in grids:
        ours = vision.places([grid], cfg)
        thw = vlm.grid_thw([grid])
        taps, weights = get_vision_interpolation_indices_and_weights(
            thw, side, align_corners=True, spatial_merge_size=2
        )
        theirs = look_up(taps.numpy(), weights.numpy().astype(np.float64))
        assert within(1e-6, look_up(ours.taps[0], ours.weights[0].astype(np.float64)), theirs)
        assert (ours.rows[0] == get_vision_position_ids(thw, 2).numpy()).all()
        assert ours.lengths == grid[0] * grid[1]


@pytest.mark.parametrize("grid", [(3, 4), (4, 5), (0, 4), (6, 6)])
def test_images_that_cannot_be(grid):
    _, cfg, _ = pair("grouped")
    with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]} patches.*at most 32"):
        vision.places([grid], cfg.vision, patches=32)


def test_small_activations_show_every_epsilon():
    model, cfg, params = pair("grouped", stream=1e-3)
    batch = pictures("grouped")
    ours = image_features(cfg, params, batch, patches=28)
    theirs = vlm.features(model, batch)
    for own, right in zip(ours, theirs, strict=True):
        assert within(TOLERANCE, own[: len(right)], right)
    usual = vlm.features(pair("grouped")[0], batch)
    # without epsilons only the last product would know of the scale
    assert all(relative_error(1e-3 * x, y) > 1e-2 for x, y in zip(usual, theirs, strict=True))


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference():
    """Mean error of an image's features against float32, weights rounded to bfloat16 first."""
    ratios = []
    for name in ("grouped", "one_kv_head"):
        model, _, _ = pair(name)
        batch = conversations(name, vlm.EVERY[1:] * 5)  # as for logits: compiled once
        rounded = vlm.rounded(model)
        exact = vlm.features(rounded, batch)
        theirs = vlm.features(vlm.rounded(model, "bfloat16"), batch)
        cfg, params = carry(rounded)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        ours = image_features(cfg, params, batch)
        assert ours.dtype == jnp.bfloat16
        mean = lambda xs, right=exact: np.mean(
            [relative_error(x[: len(y)], y) for x, y in zip(xs, right, strict=True)]
        )
        ratios.append(mean(ours) / mean(theirs))
    assert within(1.25, max(ratios)), ratios
