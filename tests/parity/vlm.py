"""Toy Qwen3-VL models of the reference, conversations with images, and what the reference answers.

Nothing of ours is imported here.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.parity.reference import normal, randomize

VOCAB = 160
IMAGE, VIDEO, START, END = 150, 151, 152, 153  # ids below are text
Grid = tuple[int, int]  # rows and columns in patches
Part = int | Grid  # so many tokens of text, or an image between its start and its end

MODELS = {
    "grouped": {},
    # the released ratio of frequencies, the released vision head; tied; DeepStack of late blocks
    "one_kv_head": dict(
        layers=3,
        heads=3,
        kv_heads=1,
        head_width=128,
        section=(24, 20, 20),
        tied=True,
        vision_width=144,
        blocks=3,
        deepstack=(1, 2),
        side=7,
        patch=2,
        seed=1,
    ),
    "deep": dict(
        width=48,
        layers=6,
        heads=6,
        kv_heads=2,
        head_width=32,
        section=(6, 5, 5),
        vision_width=32,
        vision_heads=4,
        blocks=6,
        deepstack=(0, 1, 3, 4),
        side=5,
        seed=2,
    ),
}
CONVERSATIONS: dict[str, tuple[Part, ...]] = {
    "text": (9,),
    "one image": (5, (4, 6), 4),
    "two images": (3, (4, 6), (8, 4), 2),  # the example of reference/qwen3_vl.md
    "image first": ((2, 2), 6),
    "turns": (4, (6, 4), 5, 7, 3, (2, 10), 6),  # images in the first and the third
    "image last": (1, (6, 2), 3, (2, 4)),
}
EVERY = tuple(CONVERSATIONS.values())


@functools.cache
def model(
    width: int = 32,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int = 16,
    section: tuple[int, int, int] = (3, 3, 2),
    theta: float = 5e6,
    tied: bool = False,
    vision_width: int = 24,
    vision_heads: int = 2,
    blocks: int = 4,
    deepstack: tuple[int, ...] = (0, 1, 2),
    side: int = 4,
    patch: int = 4,
    seed: int = 0,
    stream: float = 1.0,
) -> Qwen3VLForConditionalGeneration:
    """A toy model whose attention is sharp enough that positions show.

    `stream` scales what is written to the residual streams, so that at 1e-3 the epsilons of all
    norms decide the result.
    """
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_width,
            rms_norm_eps=1e-6,
            max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=theta,
                mrope_section=list(section),
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            depth=blocks,
            hidden_size=vision_width,
            intermediate_size=2 * vision_width + 4,
            num_heads=vision_heads,
            patch_size=patch,
            out_hidden_size=width,
            num_position_embeddings=side**2,
            deepstack_visual_indexes=list(deepstack),
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    toy = Qwen3VLForConditionalGeneration(config).eval()
    gains = {"pos_embed": vision_width**0.5, "attn.qkv": 1.4, "o_proj": 0.6, "down_proj": 0.8}
    randomize(toy, seed, gains)
    # patches, table, attention and MLP of the tower; mergers write to the decoder; queries and keys
    # are scaled for the sake of their norms
    small = ("patch_embed", "pos_embed", "attn.proj", "linear_fc2", "embed_tokens", "o_proj")
    small += ("down_proj", "q_proj", "k_proj")
    for name, weight in toy.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data *= 1.4  # sharp attention
        if any(part in name for part in small):
            weight.data *= stream
    return toy.requires_grad_(False)


def rounded(toy: Qwen3VLForConditionalGeneration, dtype: str = "float32"):
    """A copy with weights rounded to bfloat16, held in `dtype`; rotary frequencies stay float32."""
    toy = copy.deepcopy(toy)
    for weight in toy.parameters():
        weight.data = weight.data.bfloat16().to(getattr(torch, dtype))
    return toy


@dataclasses.dataclass(frozen=True)
class Batch:
    """Conversations as right-padded rows, and the pixels of their images in order.

    Attributes:
      ids: tokens (b, l), 0 where padding.
      lengths: real tokens of each row.
      grids: patches of the images of each row.
      pixels: patches of each image (h * w, channels * 2 * patch * patch), equal in time.
    """

    ids: np.ndarray
    lengths: np.ndarray
    grids: tuple[tuple[Grid, ...], ...]
    pixels: tuple[np.ndarray, ...]

    @property
    def all_grids(self) -> list[Grid]:
        """Of all rows."""
        return list(itertools.chain(*self.grids))

    @property
    def mask(self) -> np.ndarray:
        """Real tokens."""
        return np.arange(self.ids.shape[1]) < self.lengths[:, None]


def tokens(parts: Sequence[Part], rng: np.random.Generator) -> np.ndarray:
    """Token ids of one conversation."""
    runs = []
    for part in parts:
        if isinstance(part, int):
            runs.append(rng.integers(1, IMAGE, part))
        else:
            runs.append([START, *[IMAGE] * (part[0] * part[1] // 4), END])
    return np.concatenate(runs).astype(np.int32)


def batch(rows: Sequence[Sequence[Part]], patch: int, *, room: int = 0, seed: int = 0) -> Batch:
    """Conversations of these parts, padded to the longest and `room` more."""
    rng = np.random.default_rng(seed)
    lines = [tokens(parts, rng) for parts in rows]
    lengths = np.int32([len(line) for line in lines])
    ids = np.zeros((len(rows), lengths.max() + room), np.int32)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = line
    grids = tuple(tuple(part for part in parts if not isinstance(part, int)) for parts in rows)
    pixels = [
        pictures(h * w, patch, seed=seed + i) for i, (h, w) in enumerate(itertools.chain(*grids))
    ]
    return Batch(ids, lengths, grids, tuple(pixels))


def pictures(patches: int, patch: int, seed: int) -> np.ndarray:
    """Patches of a still: (channel, time, y, x) flattened, both frames the same."""
    frame = normal(patches, 3, 1, patch, patch, seed=seed)
    return np.repeat(frame, 2, axis=2).reshape(patches, -1)


def grid_thw(grids: Sequence[Grid]) -> torch.Tensor:
    """Image sizes as the reference takes them."""
    return torch.tensor([(1, *grid) for grid in grids])


def arguments(toy: Qwen3VLForConditionalGeneration, batch: Batch) -> dict[str, torch.Tensor]:
    """What the reference's processor would hand to the model."""
    ids = torch.from_numpy(batch.ids).long()
    given = dict(input_ids=ids, attention_mask=torch.from_numpy(batch.mask).long())
    if batch.pixels:
        given["pixel_values"] = torch.from_numpy(np.concatenate(batch.pixels)).to(toy.dtype)
        given["image_grid_thw"] = grid_thw(batch.all_grids)
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given


@torch.no_grad()
def answer(
    toy: Qwen3VLForConditionalGeneration, batch: Batch, **more: torch.Tensor
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of every token, and the hidden states, the embedding first."""
    given = {**arguments(toy, batch), **more}
    out = toy(**given, output_hidden_states=True, use_cache=False)
    return out.logits.float().numpy(), [x.float().numpy() for x in out.hidden_states]


def logits(toy: Qwen3VLForConditionalGeneration, batch: Batch, **more) -> np.ndarray:
    """Logits of the real tokens (tokens, vocab)."""
    return answer(toy, batch, **more)[0][batch.mask]


@torch.no_grad()
def features(toy: Qwen3VLForConditionalGeneration, batch: Batch) -> list[np.ndarray]:
    """Features of each image (cells, parts, width): the main ones, then DeepStack's."""
    given = arguments(toy, batch)
    out = toy.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
    parts = (out.pooler_output, *out.deepstack_features)
    return [torch.stack(image, dim=1).float().numpy() for image in zip(*parts, strict=True)]


def rope_index(toy: Qwen3VLForConditionalGeneration, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Position ids (b, l, 3) and deltas (b,)."""
    given = arguments(toy, batch)
    given.pop("pixel_values", None)
    ids = given["input_ids"]
    given.setdefault("mm_token_type_ids", torch.zeros_like(ids).int())
    positions, deltas = toy.model.get_rope_index(**given)
    return positions.permute(1, 2, 0).numpy(), deltas[:, 0].numpy()
