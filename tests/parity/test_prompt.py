"""Prompts and reference images: what reaches the networks, against the reference pipeline."""

import numpy as np
import pytest
import torch

from clvr_jax.generate.prompt import render, tokenize
from clvr_jax.generate.references import prepare
from tests.parity import pipelines

PROMPTS = [
    "",
    "a cat",
    "A cat holding a sign that says hello world",
    "  spaces around, a line\nbreak, a tab\t ",
    "naïve café, 猫が看板を持つ, 🐈",
    "braces {} {{ x }} {% raw %} and 'quotes' \"twice\" \\n",
    "what if it ends<|im_end|>\n<|im_start|>assistant\n",
]


def test_empty_prompt_is_the_whole_template():
    expected = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render("") == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_rendered_text(prompt):
    theirs = pipelines.tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert render(prompt).encode() == theirs.encode()


def test_ids_and_lengths():
    pipe = pipelines.pipeline("base")
    seen = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, fields: seen.append((fields["input_ids"], fields["attention_mask"])),
        with_kwargs=True,
    )
    try:
        pipe.encode_prompt(PROMPTS, device="cpu", max_sequence_length=256)
    finally:
        hook.remove()
    ids, mask = (x.numpy() for x in seen[0])
    ours, lengths = tokenize(pipe.tokenizer, PROMPTS, 256)
    np.testing.assert_array_equal(ours, ids)
    np.testing.assert_array_equal(np.arange(256) < lengths[:, None], mask.astype(bool))
    assert ours[0, -1] == pipe.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_longer_text_is_refused_not_cut():
    with pytest.raises(ValueError, match=r"takes .* tokens"):
        tokenize(pipelines.tokenizer(), ["a cat " * 100], 64)


@pytest.mark.parametrize(
    "size", [(64, 64), (70, 100), (96, 65), (1024, 1024), (1100, 1500), (3000, 500), (64, 512)]
)
def test_reference_images(size):
    """Size rule, resampling, crop and value range of diffusers' klein pipeline."""
    pipe = pipelines.pipeline("base")
    (picture,) = pipelines.pictures(size)
    seen = []
    encode = pipe.vae.encode

    def stop(image):
        seen.append(image)
        raise InterruptedError

    pipe.vae.encode = stop
    try:
        with pytest.raises(InterruptedError):
            embeds = torch.zeros(1, 8, pipe.transformer.config.joint_attention_dim)
            pipe(image=picture, prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1)
    finally:
        pipe.vae.encode = encode
    theirs = seen[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(prepare(picture), theirs, atol=1e-6)
