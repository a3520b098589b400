"""Mistakes that ports of Qwen3-VL have made in the vision tower, made in the reference itself.

As in `test_vlm_pitfalls.py`: image features and logits then differ far beyond the tolerance.
"""

import pytest
import torch
from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from tests.parity import vlm
from tests.parity.mistakes import Mistaken
from tests.parity.test_vlm import TOLERANCE
from tests.parity.test_vlm_pitfalls import neighbours

FAR = 1000 * TOLERANCE


@pytest.fixture(params=vlm.MODELS)
def m(request, monkeypatch) -> Mistaken:
    return Mistaken(request.param, monkeypatch)


def differs(m: Mistaken, limit: float = FAR) -> bool:
    """Whether every part of the features, and the logits, are far from the right ones."""
    return bool((m.parts() > limit).all()) and m.logits() > limit


def mergers(m: Mistaken) -> list[nn.Module]:
    return [m.visual.merger, *m.visual.deepstack_merger_list]


def test_without_a_mistake(m):
    assert m.parts().max() == 0


def test_gelu_of_blocks_is_the_tanh_form(m):
    for block in m.visual.blocks:
        m.patch.setitem(block.mlp._modules, "act_fn", nn.GELU())
    assert differs(m, 10 * TOLERANCE)


def test_gelu_of_mergers_is_the_exact_one(m):
    for merger in mergers(m):
        m.patch.setitem(merger._modules, "act_fn", nn.GELU(approximate="tanh"))
    assert differs(m, 10 * TOLERANCE)


def test_main_merger_normalises_before_joining(m):
    merger = m.visual.merger
    weight, bias = (x.repeat(4) for x in (merger.norm.weight, merger.norm.bias))

    def join_first(x):
        x = nn.functional.layer_norm(x.view(-1, len(weight)), (len(weight),), weight, bias, 1e-6)
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(x)))

    m.forward(merger, join_first)
    assert m.parts()[0] > FAR
    assert m.logits() > FAR


def test_deepstack_mergers_normalise_after_joining(m):
    for merger in m.visual.deepstack_merger_list:

        def norm_first(x, merger=merger):
            x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6).view(-1, 4 * x.shape[-1])
            x = x * merger.norm.weight + merger.norm.bias
            return merger.linear_fc2(merger.act_fn(merger.linear_fc1(x)))

        m.forward(merger, norm_first)
    assert (m.parts()[1:] > FAR).all()
    assert m.logits() > FAR


def test_patch_bias(m):
    m.weight(m.visual.patch_embed.proj, "bias", torch.zeros_like(m.visual.patch_embed.proj.bias))
    assert differs(m)


@pytest.mark.parametrize("choice", ["first frame", "second frame", "mean of frames"])
def test_both_frames_count(m, choice):
    kernel = m.visual.patch_embed.proj.weight
    parts = {
        "first frame": torch.tensor([1.0, 0.0]),
        "second frame": torch.tensor([0.0, 1.0]),
        "mean of frames": torch.tensor([0.5, 0.5]),
    }
    m.weight(m.visual.patch_embed.proj, "weight", kernel * parts[choice][:, None, None])
    assert differs(m)


def test_half_pixel_lookup(m):
    """align_corners=False."""
    m.patch.setattr(m.visual, "interpolation_align_corners", False)
    assert differs(m)


@pytest.mark.parametrize("choice", ["nearest", "lower", "unweighted", "columns first", "absent"])
def test_lookup(m, choice):
    right = modeling.get_vision_interpolation_indices_and_weights

    def wrong(*args, **more):
        taps, weights = right(*args, **more)
        if choice == "nearest":
            weights = nn.functional.one_hot(weights.argmax(1), 4).float()
        elif choice == "lower":
            weights = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand_as(weights)
        elif choice == "unweighted":
            weights = torch.full_like(weights, 0.25)
        elif choice == "columns first":
            side = m.visual.num_grid_per_side
            taps = taps % side * side + taps // side
        else:
            weights = torch.zeros_like(weights)
        return taps, weights

    m.patch.setattr(modeling, "get_vision_interpolation_indices_and_weights", wrong)
    assert differs(m)


def raster(m, rows: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """What is in cell order, taken as if it were in raster order."""
    out = []
    for (_, h, w), part in zip(
        grid_thw.tolist(), rows.split(grid_thw.prod(-1).tolist()), strict=True
    ):
        cells = part.view(h // 2, w // 2, 2, 2, *part.shape[1:])
        out.append(cells.transpose(1, 2).reshape(part.shape))
    return torch.cat(out)


@pytest.mark.parametrize(
    "choice", ["swapped", "in raster order", "in cells", "from one", "row only", "absent"]
)
def test_rotary_places(m, choice):
    """From one is no mistake: only differences of places count."""
    right = modeling.get_vision_position_ids

    def wrong(grid_thw, *args, **more):
        places = right(grid_thw, *args, **more)
        return {
            "swapped": lambda: places.flip(-1),
            "in raster order": lambda: raster(m, places, grid_thw),
            "in cells": lambda: places // 2,
            "from one": lambda: places + 1,
            "row only": lambda: places * torch.tensor([1, 0]),
            "absent": lambda: places * 0,
        }[choice]()

    m.patch.setattr(modeling, "get_vision_position_ids", wrong)
    if choice == "from one":
        assert m.parts().max() < TOLERANCE
    else:
        assert differs(m)


def test_rotated_in_neighbouring_pairs(m):
    m.patch.setattr(modeling, "rotate_half", neighbours)
    assert (m.parts() > FAR).all()


def test_rotation_in_interleaved_axes(m):
    """The first half of the frequencies turns with the row, the second with the column."""

    def interleaved(freq):
        both = torch.stack([freq[:, 0], freq[:, 1]], dim=-1).flatten(-2)
        return torch.cat([both, both], dim=-1)

    m.patch.setattr(m.visual.rotary_pos_emb, "recomposition_frequencies", interleaved)
    assert differs(m)


def test_rotary_base_of_the_decoder(m):
    rotary = m.visual.rotary_pos_emb
    # exponents of the two bases are the same
    m.patch.setitem(
        rotary._buffers, "inv_freq", rotary.inv_freq ** (torch.tensor(5e6).log() / 9.21)
    )
    assert differs(m)


def test_images_that_see_each_other(m):
    """An image's patches attend that image only."""
    right = modeling.get_vision_attention_seqlens

    def packed(grid_thw, *args, **more):
        seqlens, _ = right(grid_thw, *args, **more)
        return seqlens[[0, -1]], int(seqlens[-1])

    m.patch.setattr(modeling, "get_vision_attention_seqlens", packed)
    assert differs(m)


@pytest.mark.parametrize("shift", [-1, 1])
def test_deepstack_of_neighbouring_blocks(m, shift):
    """Indices count from 0 and name blocks whose outputs are taken."""
    right = m.visual.deepstack_visual_indexes
    last = len(m.visual.blocks) - 1
    moved = [min(max(block + shift, 0), last) for block in right]
    if len(set(moved)) < len(right):
        pytest.skip("the block next to the first or last one does not exist")
    m.patch.setattr(m.visual, "deepstack_visual_indexes", moved)
    assert (m.parts()[1:] > FAR).all()
    assert m.logits() > FAR


def test_patches_in_raster_order(m):
    """Pixels come cell by cell."""
    right = m.visual.patch_embed.forward
    grids = vlm.grid_thw(m.batch.all_grids)
    m.forward(m.visual.patch_embed, lambda pixels: raster(m, right(pixels), grids))
    assert differs(m)


def test_queries_keys_and_values_in_another_order(m):
    """The joint kernel is (3, heads, k), not (heads, 3, k)."""
    for block in m.visual.blocks:
        attention = block.attn
        for name in ("weight", "bias"):
            joint = getattr(attention.qkv, name)
            parts = joint.unflatten(0, (attention.num_heads, 3, -1)).transpose(0, 1)
            m.weight(attention.qkv, name, parts.reshape(joint.shape))
    assert differs(m)
