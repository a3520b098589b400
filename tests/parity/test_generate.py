"""Whole pictures against diffusers' Flux2KleinPipeline and Flux2KleinKVPipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.generate import image
from clvr_jax.generate.image import Settings, generate
from clvr_jax.generate.references import prepare
from tests.parity import pipelines
from tests.parity.ours import image_model
from tests.parity.reference import error_ratio, round_bfloat16, within

TOLERANCE = 1e-4
PROMPTS = ["a cat", "the user says hello world, holding a sign"]
REFERENCES = pipelines.pictures((70, 100), (96, 64), (64, 131))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Our model, read from the folder that diffusers wrote."""
    return image_model(pipelines.save("base", tmp_path_factory.mktemp("diffusers")))


def settings(**fields) -> Settings:
    height, width = pipelines.SIZE
    return Settings(height, width, **{"steps": pipelines.STEPS, **fields})


def ours(model, monkeypatch, noise, references=(), **fields):
    """Our final latents (b, tokens, c) and pictures (b, height, width, 3)."""
    seen = []
    decode = image.decode

    def keep(nets, params, latents):
        seen.append(np.asarray(latents, np.float32))
        return decode(nets, params, latents)

    monkeypatch.setattr(image, "decode", keep)
    pixels = generate(
        model,
        PROMPTS,
        [prepare(reference) for reference in references],
        seeds=range(len(noise) // len(PROMPTS)),
        settings=settings(**fields),
        noise=jnp.asarray(noise),
    )
    latents = seen[0]
    return latents.reshape(len(latents), -1, latents.shape[-1]), np.concatenate(pixels)


@pytest.mark.parametrize(
    ("kind", "references", "guidance", "steps"),
    [
        ("base", 0, 4.0, 6),
        pytest.param("base", 2, 4.0, 4, marks=pytest.mark.slow),
        pytest.param("base", 0, 1.0, 4, marks=pytest.mark.slow),
        pytest.param("distilled", 1, 1.0, 4, marks=pytest.mark.slow),
        pytest.param("distilled", 3, 1.0, 4, marks=pytest.mark.slow),
        pytest.param("kv", 0, 1.0, 4, marks=pytest.mark.slow),
        pytest.param("kv", 1, 1.0, 4, marks=pytest.mark.slow),
        ("kv", 2, 1.0, 4),
    ],
)
def test_pictures(model, monkeypatch, kind, references, guidance, steps):
    chosen = REFERENCES[:references]
    guided = {} if kind == "kv" else {"guidance_scale": guidance}
    pattern = "kv" if kind == "kv" else "full"
    start = pipelines.noise(4 if kind == "distilled" else 2)  # one or two for each prompt
    theirs, expected = pipelines.run(
        kind, PROMPTS, start, chosen, num_inference_steps=steps, **guided
    )
    latents, pixels = ours(
        model, monkeypatch, start, chosen, guidance=guidance, steps=steps, pattern=pattern
    )
    assert within(TOLERANCE, latents, theirs)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_every_input_shows():
    """On these toy models each input changes many grey levels, so equal pictures mean something."""
    start = pipelines.noise(2)
    make = lambda kind="base", prompts=PROMPTS, references=REFERENCES[:2], **fields: pipelines.run(
        kind, prompts, start, references, **{"guidance_scale": 4.0, **fields}
    )[1].astype(int)
    right = make()
    wrong = {
        "prompts": make(prompts=PROMPTS[::-1]),
        "guidance": make(guidance_scale=1.0),
        "references": make(references=[]),
        "order of references": make(references=REFERENCES[1::-1]),
        "padding": make(max_sequence_length=64),
        "steps": make(num_inference_steps=5),
    }
    for name, pictures in wrong.items():
        assert np.abs(pictures - right).max() > 5, (name, np.abs(pictures - right).max())
    plain = pipelines.run("distilled", PROMPTS, start, REFERENCES[:2])[1].astype(int)
    cached = pipelines.run("kv", PROMPTS, start, REFERENCES[:2])[1].astype(int)
    assert np.abs(plain - cached).max() > 5


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference(model, monkeypatch):
    """Mean error of text, loop and pictures over 8 starts, weights rounded to bfloat16 first."""
    start = round_bfloat16(pipelines.noise(8))
    exact, theirs = (
        pipelines.run("distilled", PROMPTS, start, REFERENCES[:1], weights)
        for weights in ("rounded", "bfloat16")
    )
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params)
    found = ours(dataclasses.replace(model, params=half), monkeypatch, start, REFERENCES[:1])
    for mine, peer, right in zip(found, theirs, exact):
        assert within(1.25, error_ratio(mine, peer, right))
