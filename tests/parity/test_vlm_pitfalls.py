"""Mistakes that ports of Qwen3-VL have made in the decoder are other functions on the toy models.

Each mistake is made in the reference itself: that it then differs from itself far beyond the
tolerance of parity shows that parity rules the mistake out. Section 2 of reference/qwen3_vl.md.
"""

import types

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from tests.parity import vlm
from tests.parity.mistakes import Mistaken
from tests.parity.reference import relative_error
from tests.parity.test_vlm import TOLERANCE

FAR = 1000 * TOLERANCE


@pytest.fixture(params=vlm.MODELS)
def m(request, monkeypatch) -> Mistaken:
    return Mistaken(request.param, monkeypatch)


def test_without_a_mistake(m):
    """What these tests do otherwise changes nothing."""
    assert m.logits() == 0
    assert m.with_positions(m.right_positions) < TOLERANCE
    assert m.with_positions(advancing(m.batch, max)) < TOLERANCE
    assert m.with_deepstack(lambda embeds, mask, parts: (embeds, parts)) == 0


def test_contiguous_sections(m):
    """Blocks of time, height and width, as in Qwen2-VL and Qwen2.5-VL."""

    def contiguous(self, freq):
        parts = freq.split(self.mrope_section, dim=-1)
        joined = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        return torch.cat([joined, joined], dim=-1)

    rotary = m.text.rotary_emb
    m.patch.setattr(rotary, "recomposition_frequencies", types.MethodType(contiguous, rotary))
    assert m.logits() > FAR


def test_base_of_qwen3(m):
    """1e6 for 5e6."""
    rotary = m.text.rotary_emb
    frequencies = rotary.inv_freq ** (np.log(1e6) / np.log(5e6))
    m.patch.setitem(rotary._buffers, "inv_freq", frequencies.float())
    assert m.logits() > FAR


def test_rotated_in_neighbouring_pairs(m, monkeypatch):
    """Channel j belongs to channel j + half."""
    monkeypatch.setattr(modeling, "rotate_half", neighbours)
    assert m.logits() > FAR


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """`rotate_half` for pairs (0, 1), (2, 3), ..."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def advancing(batch: vlm.Batch, step) -> np.ndarray:
    """Positions in the sheet's words, but for the step after an image of h x w cells."""
    out = np.zeros((*batch.ids.shape, 3), int)
    for row, ids, length, grids in zip(out, batch.ids, batch.lengths, batch.grids, strict=True):
        remaining, i, at = list(grids), 0, 0
        while i < length:
            if ids[i] != vlm.IMAGE:
                row[i], i, at = at, i + 1, at + 1
                continue
            h, w = (side // 2 for side in remaining.pop(0))
            for cell in range(h * w):
                row[i + cell] = at, at + cell // w, at + cell % w
            i, at = i + h * w, at + step(h, w)
    return out


def one_by_one(right, batch):
    return np.broadcast_to(np.arange(right.shape[1])[:, None], right.shape)


def from_zero(right, batch):
    image = (batch.ids == vlm.IMAGE)[..., None]
    return np.where(image, right - right[..., :1], right)


def column_by_column(right, batch):
    """Cells numbered along height first: their places by the transposed grid."""
    turned = tuple(tuple((w, h) for h, w in grids) for grids in batch.grids)
    other = vlm.Batch(batch.ids, batch.lengths, turned, batch.pixels)
    return advancing(other, max)[..., [0, 2, 1]]


POSITIONS = {
    "one by one": one_by_one,
    "time on all axes": lambda right, batch: right[..., [0, 0, 0]],
    "height and width swapped": lambda right, batch: right[..., [0, 2, 1]],
    "axes in another order": lambda right, batch: right[..., [1, 2, 0]],
    "image axes from zero": from_zero,
    "cells column by column": column_by_column,
    "on after H * W": lambda right, batch: advancing(batch, lambda h, w: h * w),
    "on after H": lambda right, batch: advancing(batch, lambda h, w: h),
    "on after min": lambda right, batch: advancing(batch, min),
    "on after one": lambda right, batch: advancing(batch, lambda h, w: 1),
    "on after max in patches": lambda right, batch: advancing(batch, lambda h, w: 2 * max(h, w)),
}


@pytest.mark.parametrize("choice", POSITIONS)
def test_positions(m, choice):
    assert m.with_positions(POSITIONS[choice](m.right_positions, m.batch)) > FAR


def early(embeds, mask, parts):
    embeds[mask] += parts[0]
    return embeds, parts[1:]


def next_cell(embeds, mask, parts):
    embeds[mask] = embeds[mask].roll(1, dims=0)
    return embeds, parts


FEATURES = {
    "DeepStack missing": lambda embeds, mask, parts: (embeds, None),
    "DeepStack one layer late": lambda embeds, mask, parts: (embeds, [0 * parts[0], *parts]),
    "DeepStack one layer early": early,
    "DeepStack reversed": lambda embeds, mask, parts: (embeds, parts[::-1]),
    "DeepStack's first part only": lambda embeds, mask, parts: (embeds, parts[:1]),
    "DeepStack of the next cell": lambda embeds, mask, parts: (
        embeds,
        [part.roll(1, dims=0) for part in parts],
    ),
    "main features of the next cell": next_cell,
}


@pytest.mark.parametrize("choice", FEATURES)
def test_features(m, choice):
    assert m.with_deepstack(FEATURES[choice]) > FAR


@pytest.mark.parametrize("choice", ["not put in", "added"])
def test_embedding_of_the_image_token(m, choice):
    """Features take its place."""
    token = m.text.embed_tokens.weight[vlm.IMAGE].clone()

    def wrong(embeds, mask, parts):
        embeds[mask] = (embeds[mask] if choice == "added" else 0) + token
        return embeds, parts

    assert m.with_deepstack(wrong) > FAR


def test_states_after_deepstack(m):
    """Hidden state 1 is the stream before the addition."""
    given = vlm.answer(m.model, m.batch)[1][1]
    image = m.batch.ids == vlm.IMAGE
    added = given[image] + m.right_features[:, 1]
    assert relative_error(added, given[image]) > FAR


def test_images_seen_from_both_sides(m):
    """Attention is causal over an image's cells too."""
    real, image = m.batch.mask, m.batch.ids == vlm.IMAGE
    causal = np.tril(np.ones((image.shape[1],) * 2, bool)) & real[:, None]
    group = np.cumsum(~image, axis=1)  # the cells of an image share one
    inside = image[:, None] & image[:, :, None] & (group[:, None] == group[:, :, None])
    use = lambda seen: m.patch.setattr(
        modeling, "create_causal_mask", lambda **_: torch.from_numpy(seen)[:, None]
    )
    use(causal)
    assert m.logits() < TOLERANCE
    use(causal | inside)
    assert m.logits() > FAR


def test_padding_seen(m):
    """Pads on the left that are not masked; on the right causality hides them from real tokens."""
    ids = np.roll(m.batch.ids, 2, axis=1)
    lengths = m.batch.lengths + 2
    rows = [row for row, length in enumerate(lengths) if length <= ids.shape[1]]
    shifted = vlm.Batch(ids, np.minimum(lengths, ids.shape[1]), m.batch.grids, m.batch.pixels)
    wrong, right = (vlm.answer(m.model, batch)[0] for batch in (shifted, m.batch))
    for row in rows:
        length = m.batch.lengths[row]
        assert relative_error(wrong[row, 2 : 2 + length], right[row, :length]) > FAR
