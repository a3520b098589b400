"""Toy FLUX.2 klein pipelines of diffusers: tokenizer, template, components, whole folders."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from tests.parity import coders, reference
from tests.parity.reference import normal

# what matters of Qwen3's template: roles, and the empty think block only where thinking is off
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)
_CORPUS = "a cat holding a sign that says hello world, the user and the assistant think " * 3
SIZE = (48, 80)  # height and width of the pictures made, in pixels
STEPS = 4


def tokenizer() -> Qwen2TokenizerFast:
    """A byte-level BPE of a few merges with Qwen's special tokens and a Qwen3-style template."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([_CORPUS], trainer)
    table = json.loads(trained.to_str())["model"]
    made = Qwen2TokenizerFast(
        vocab=table["vocab"],
        merges=[tuple(pair) for pair in table["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = CHAT_TEMPLATE
    return made


@functools.cache
def pipeline(kind: str, weights: str = "float32") -> Flux2KleinPipeline | Flux2KleinKVPipeline:
    """A whole pipeline: "base" (guided), "distilled" or "kv", all from the same weights.

    `weights` is "float32", "bfloat16", or "rounded": bfloat16 values computed with in float32.
    """
    networks = {
        "vae": coders.vae(),
        "text_encoder": coders.text_encoder(),
        "transformer": reference.transformer(),
    }
    if weights != "float32":
        networks = {name: reference.rounded(model) for name, model in networks.items()}
    if weights == "bfloat16":
        networks = {name: model.bfloat16() for name, model in networks.items()}
    made = {"base": Flux2KleinPipeline, "distilled": Flux2KleinPipeline, "kv": Flux2KleinKVPipeline}
    pipe = made[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
        ),
        tokenizer=tokenizer(),
        **networks,
        is_distilled=kind != "base",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(kind: str, folder: Path) -> Path:
    """Write a pipeline as diffusers does and return its folder."""
    pipeline(kind).save_pretrained(folder / kind)
    return folder / kind


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[PIL.Image.Image]:
    """Smooth noisy pictures of (height, width)."""
    rng = np.random.default_rng(seed)
    made = []
    for height, width in sizes:
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
        noise = rng.normal(0, 10, (height, width, 3))
        made.append(PIL.Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)))
    return made


def noise(batch: int, seed: int = 0) -> np.ndarray:
    """Initial latents (batch, rows, cols, channels) for pictures of `SIZE`."""
    pipe = pipeline("base")
    rows, cols = (side // (2 * pipe.vae_scale_factor) for side in SIZE)
    return normal(batch, rows, cols, pipe.transformer.config.in_channels, seed=seed)


def run(
    kind: str,
    prompts: list[str],
    latents: np.ndarray,
    references: Sequence[PIL.Image.Image] = (),
    weights: str = "float32",
    **fields,
) -> tuple[np.ndarray, np.ndarray]:
    """Make pictures; returns the final latents (batch, tokens, channels) and uint8 pixels.

    Each prompt starts from as many of `latents` as it gets when they are dealt out in order.
    `fields` go to the pipeline (num_inference_steps, guidance_scale).
    """
    seen = {}

    def keep(pipe, step, t, state):
        seen.update(state)
        return {}

    out = pipeline(kind, weights)(
        image=list(references) or None,
        prompt=prompts,
        num_images_per_prompt=len(latents) // len(prompts),
        height=SIZE[0],
        width=SIZE[1],
        latents=torch.from_numpy(latents).permute(0, 3, 1, 2),
        callback_on_step_end=keep,
        **{"num_inference_steps": STEPS, **fields},
    )
    images = np.stack([np.asarray(image) for image in out.images])
    assert images.std() >= 0.2 * 255, "the toy pictures have no contrast"
    assert np.mean((images == 0) | (images == 255)) < 0.05, "the toy pictures are clamped"
    return seen["latents"].float().numpy(), images
