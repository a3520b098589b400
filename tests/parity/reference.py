"""Toy transformers of the reference with random, non-degenerate weights, and how to compare.

Scales are chosen so that activations and outputs are of order one and every weight matters; the
tests assert it. Nothing of ours is imported here.
"""

import copy
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)

Size = tuple[int, int]


def relative_error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|, in float64; infinite when ours is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"ours is {ours.shape}, theirs {theirs.shape}"
    assert np.isfinite(theirs).all() and np.abs(theirs).max() > 0
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return float(error) if np.isfinite(error) else math.inf


MEASURED: dict[str, tuple[float, float]] = {}  # by test: the largest value and its limit


def within(limit: float, value, theirs=None) -> bool:
    """Whether a value, or the relative error of an array, is below its limit; remembers it."""
    value = value if theirs is None else relative_error(value, theirs)
    test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].split("[")[0]
    MEASURED[test] = (max(value, MEASURED.get(test, (0.0,))[0]), limit)
    return value < limit


def error_ratio(ours, theirs, exact) -> float:
    """Our relative error over theirs, each averaged over the samples of the first axis."""
    mean = lambda xs: np.mean([relative_error(x, y) for x, y in zip(xs, exact, strict=True)])
    return float(mean(np.asarray(ours, np.float32)) / mean(theirs))


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, as float32."""
    return torch.from_numpy(x).bfloat16().float().numpy()


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """A float32 copy of a model with its weights rounded to bfloat16."""
    return copy.deepcopy(model).bfloat16().float()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomize(model: torch.nn.Module, seed: int, gains: dict[str, float]) -> None:
    """Fill kernels with N(0, gain^2 / fan_in), norm weights around one, biases around zero.

    `gains` maps a part of a parameter's name to its gain; the first match wins, the default is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.2 * noise
        elif weight.ndim == 1:
            value = 1 + 0.3 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            gain = next((g for part, g in gains.items() if part in name), 1.0)
            value = noise * gain / math.sqrt(weight[0].numel())
        weight.data.copy_(value)


def transformer(
    heads: int = 4,
    axes: Sequence[int] = (4, 4, 4, 4),
    double: int = 2,
    single: int = 3,
    text_width: int = 96,
    channels: int = 16,
    mlp_ratio: float = 3.0,
    seed: int = 0,
    stream: float = 1.0,
) -> Flux2Transformer2DModel:
    """A toy transformer.

    `stream` scales the embeddings and everything written to the residual streams, and the queries
    and keys: every norm then sees activations of that scale while what follows it stays the same,
    so at 1e-3 the epsilons decide the result.
    """
    model = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        mlp_ratio=mlp_ratio,
        axes_dims_rope=tuple(axes),
        guidance_embeds=False,
    ).eval()
    gains = {"timestep_embedder.linear_2": 2.0, "modulation": 1.2, "norm_out": 1.2}
    randomize(model, seed, gains)
    writes = ("embedder.weight", "to_out", "to_add_out", "linear_out")
    small = ("to_q.", "to_k.", "add_q_proj", "add_k_proj", *writes)
    width = heads * sum(axes)
    for name, weight in model.named_parameters():
        if "to_qkv_mlp_proj" in name:
            weight.data[: 2 * width] *= stream
        elif any(part in name for part in small):
            weight.data *= stream
        elif "norm_" in name and weight.ndim == 1:
            weight.data *= 1.7  # sharp attention: every token shows among 512 of text
    return model.requires_grad_(False)


def kv_processors(model: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    """Install the KV attention processors, as Flux2KleinKVPipeline does, and return the model."""
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def position_ids(
    batch: int, text: int, noise: Size | None, references: Sequence[Size] = ()
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Ids (batch, tokens, 4) of text, noise and references from the reference pipeline."""
    pipe = Flux2KleinPipeline
    txt = pipe._prepare_text_ids(torch.zeros(batch, text, 1))
    img = None if noise is None else pipe._prepare_latent_ids(torch.zeros(batch, 1, *noise))
    refs = [torch.zeros(1, 1, *size) for size in references]
    ref = pipe._prepare_image_ids(refs).repeat(batch, 1, 1) if refs else None
    return txt, img, ref


@torch.no_grad()
def velocity(
    model: Flux2Transformer2DModel,
    tokens: np.ndarray,
    text: np.ndarray,
    t: np.ndarray,
    noise: Size,
    references: Sequence[Size] = (),
) -> np.ndarray:
    """The reference's velocity of the noise tokens, as Flux2KleinPipeline calls the model."""
    txt, img, ref = position_ids(len(tokens), text.shape[1], noise, references)
    dtype = model.dtype
    out = model(
        hidden_states=torch.from_numpy(tokens).to(dtype),
        encoder_hidden_states=torch.from_numpy(text).to(dtype),
        timestep=torch.from_numpy(t).to(dtype),
        img_ids=img if ref is None else torch.cat([img, ref], dim=1),
        txt_ids=txt,
        guidance=None,
        return_dict=False,
    )[0]
    return out[:, : noise[0] * noise[1]].float().numpy()


@torch.no_grad()
def kv_velocities(
    model: Flux2Transformer2DModel,
    tokens: np.ndarray,
    text: np.ndarray,
    times: Sequence[np.ndarray],
    noise: Size,
    references: Sequence[Size],
) -> list[np.ndarray]:
    """The velocity at each time, as Flux2KleinKVPipeline calls the model.

    The first call holds the references and extracts their keys and values, the others use those.
    """
    txt, img, ref = position_ids(len(tokens), text.shape[1], noise, references)
    first = noise[0] * noise[1]
    x, y = torch.from_numpy(tokens[:, :first]), torch.from_numpy(tokens[:, first:])
    call = lambda t, **fields: model(
        encoder_hidden_states=torch.from_numpy(text),
        timestep=torch.from_numpy(t),
        txt_ids=txt,
        guidance=None,
        return_dict=False,
        **fields,
    )
    out, cache = call(
        times[0],
        hidden_states=torch.cat([y, x], dim=1),
        img_ids=torch.cat([ref, img], dim=1),
        kv_cache_mode="extract",
        num_ref_tokens=y.shape[1],
    )
    cached = dict(hidden_states=x, img_ids=img, kv_cache=cache, kv_cache_mode="cached")
    return [out.numpy(), *(call(t, **cached)[0].numpy() for t in times[1:])]
