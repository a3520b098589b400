"""Sampling: what a picture depends on, and how often anything compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clvr_jax.diffusion import sampler, schedule
from clvr_jax.generate import image as generation
from clvr_jax.generate import references
from clvr_jax.generate.image import ImageModel, Networks, Settings, generate, generate_each
from clvr_jax.generate.prompt import tokenize
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3.decoder import Decoder
from launch.toy import byte_tokenizer, random_weights

SMALL = Settings(height=64, width=48, text_tokens=64)
JITTED = ("encode_text", "encode_image", "extend_cache", "denoise", "decode", "_noise")


@pytest.fixture(scope="module")
def model():
    weights = random_weights(0)
    text = dataclasses.replace(weights["text_encoder"][0], layers=27)
    params = {name: tree for name, (_, tree) in weights.items()}
    decoder = {name: params["text_encoder"][name] for name in ("embed_tokens", "layers")}
    decoder["layers"] = jax.tree.map(lambda leaf: leaf[:27], decoder["layers"])
    params["text_encoder"] = decoder
    nets = Networks(Transformer(weights["transformer"][0]), Decoder(text), Vae(weights["vae"][0]))
    return ImageModel(nets, jax.tree.map(jnp.asarray, params), byte_tokenizer())


def reference(height, width, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


def compiles():
    return sum(getattr(generation, name)._cache_size() for name in JITTED)


@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=pytest.mark.slow) for p in ("full", "kv")] + ["causal"]
)
def test_a_second_call_of_the_same_shapes_compiles_nothing(model, pattern):
    settings = dataclasses.replace(SMALL, pattern=pattern, guidance=3.0)
    refs = [reference(64, 80), reference(96, 64)]
    generate(model, ["a cup", "two"], refs, [1, 2], settings)
    before = compiles()
    changed = dataclasses.replace(settings, guidance=2.0)
    generate(model, ["another", "b"], [refs[0], reference(96, 64, 1)], [7, 8], changed)
    assert compiles() == before
    generate(model, ["another", "b"], refs[:1], [7, 8], settings)
    assert compiles() > before  # the count does count


def latents_of(monkeypatch):
    """The latents of every call from now on, as they go into the decoder."""
    found, decode = [], generation.decode

    def listen(nets, params, latents):
        found.append(np.asarray(latents))
        return decode(nets, params, latents)

    monkeypatch.setattr(generation, "decode", listen)
    return found


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(model, monkeypatch):
    latents = latents_of(monkeypatch)
    batch = generate(model, ["a", "b c"], [], [3, 4], SMALL)
    assert batch.shape == (2, 2, 64, 48, 3) and batch.dtype == np.uint8
    alone = generate(model, ["b c"], [], [4], SMALL)
    together, by_itself = latents[0][3], latents[1][0]
    assert np.abs(together - by_itself).max() <= 1e-5 * np.abs(by_itself).max()
    assert np.abs(batch[1, 1].astype(int) - alone[0, 0]).max() <= 1
    other = generate(model, ["b c"], [], [5], SMALL)
    assert np.abs(batch[1, 1].astype(int) - other[0, 0]).mean() > 5
    assert np.abs(batch[0, 0].astype(int) - batch[1, 0]).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["full", "kv"])
def test_each_picture_of_a_batch_has_its_own_references(model, pattern):
    settings = dataclasses.replace(SMALL, pattern=pattern, guidance=2.0)
    rows = [[reference(64, 80, i), reference(64, 64, 9 - i)] for i in range(3)]
    prompts, seeds = ["a cup", "two", "a cup"], [3, 4, 5]
    together, finite = generate_each(model, prompts, rows, seeds, settings)
    assert finite.tolist() == [True] * 3
    for i, row in enumerate(rows):
        alone = generate(model, [prompts[i]], row, [seeds[i]], settings)[0, 0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1
    swapped, _ = generate_each(model, prompts, rows[::-1], seeds, settings)
    assert np.abs(together[0].astype(int) - swapped[0]).max() > 1, "references count"
    plain, _ = generate_each(model, prompts, [[], [], []], seeds, settings)
    none = generate(model, prompts[:1], [], seeds[:1], settings)[0, 0]
    assert np.abs(plain[0].astype(int) - none).max() <= 1


def test_rows_of_different_references_are_refused(model):
    with pytest.raises(ValueError, match="the same sizes in every row"):
        generate_each(model, ["a", "b"], [[reference(64, 64)], []], [1, 2], SMALL)
    with pytest.raises(ValueError, match="1 prompts, 2 lists of references and 2 seeds"):
        generate_each(model, ["a"], [[], []], [1, 2], SMALL)


def test_pictures_of_no_numbers_are_no_pictures(model):
    """A reference of infinite values spoils its own picture alone."""
    spoilt = np.full((64, 64, 3), np.inf, np.float32)
    rows = [[reference(64, 64)], [spoilt]]
    _, finite = generate_each(model, ["a", "b"], rows, [1, 2], SMALL)
    assert finite.tolist() == [True, False]
    with pytest.raises(FloatingPointError, match=r"no numbers: 'b' with seed 7"):
        generate(model, ["b"], [spoilt], [7], SMALL)


def test_references_and_their_order_matter(model):
    a, b = reference(64, 64, 1), reference(64, 64, 2)
    ab = generate(model, ["x"], [a, b], [0], SMALL)
    assert np.abs(ab.astype(int) - generate(model, ["x"], [b, a], [0], SMALL)).mean() > 0.1
    assert np.abs(ab.astype(int) - generate(model, ["x"], [a], [0], SMALL)).mean() > 0.1


@pytest.mark.slow
def test_unrolled_layers_give_the_same_pictures(model):
    from clvr_jax.models.flux2.config import STACKED
    from clvr_jax.models.layers import unstack

    nets = dataclasses.replace(
        model.networks, transformer=dataclasses.replace(model.networks.transformer, scan=False)
    )
    copies = jax.tree.map(jnp.copy, model.params["transformer"])
    params = model.params | {"transformer": unstack(copies, STACKED)}
    unrolled = dataclasses.replace(model, networks=nets, params=params)
    for settings, refs in [
        (SMALL, []),
        (dataclasses.replace(SMALL, pattern="kv"), [reference(64, 64)]),
    ]:
        ours = generate(unrolled, ["x"], refs, [0], settings).astype(int)
        assert np.abs(ours - generate(model, ["x"], refs, [0], settings)).max() <= 1


def test_bad_sizes_prompts_and_noise_are_refused(model):
    with pytest.raises(ValueError, match=r"height 64, width 50.*multiples of 16"):
        generate(model, ["x"], [], [0], dataclasses.replace(SMALL, width=50))
    with pytest.raises(ValueError, match=r"takes 1[0-9]{2} tokens.*text length is 64.*to 512"):
        generate(model, ["x" * 100], [], [0], SMALL)
    with pytest.raises(ValueError, match="noise has shape"):
        generate(model, ["x"], [], [0], SMALL, noise=np.zeros((1, 2, 3, 16), np.float32))


def test_text_is_padded_in_full_on_the_right():
    tokenizer = byte_tokenizer()
    ids, lengths = tokenize(tokenizer, ["", "a cup"], 64)
    assert ids.shape == (2, 64) and lengths[1] - lengths[0] == len("a cup")
    assert (ids[0, lengths[0] :] == tokenizer.pad_token_id).all()
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_sampler_solves_a_linear_field():
    # the straight path from noise to x0 has velocity noise - x0 everywhere: any steps are exact
    noise, x0 = jnp.arange(6.0).reshape(1, 6), jnp.full((1, 6), 2.0)
    levels = jnp.asarray(schedule.sigmas(100, 7))
    out = sampler.euler(lambda x, t: noise - x0, noise, levels, levels[:-1])
    np.testing.assert_allclose(out, x0, atol=1e-6)
    # dx/ds = x: Euler's product, in closed form
    out = sampler.euler(lambda x, t: x, noise, levels, levels[:-1])
    product = np.prod(1 + np.diff(np.asarray(levels, np.float64)))
    np.testing.assert_allclose(out, noise * product, rtol=1e-5)


def test_time_given_to_the_network_is_rounded_as_asked():
    levels = jnp.asarray([1.0, 0.96738, 0.90814, 0.76720])
    for rounding, expected in {
        "none": [1000, 967.38, 908.14, 767.2],
        "bfl": [1000, 968, 908, 764],
        "diffusers": [1000, 968, 908, 768],
    }.items():
        times = jax.jit(schedule.model_times, static_argnums=1)(levels, rounding) * 1000
        np.testing.assert_allclose(times, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="choose from none, bfl, diffusers"):
        schedule.model_times(levels, "half")


@pytest.mark.parametrize(
    "size,expected",
    [
        ((1024, 1024), (1024, 1024)),
        ((2000, 1000), (720, 1440)),
        ((100, 90), (80, 96)),
        ((64, 64), (64, 64)),
    ],
)
def test_references_are_reduced_and_cropped(size, expected):
    assert references.prepare(Image.new("RGB", size)).shape == (*expected, 3)


def test_references_that_the_model_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"63x100.*at least 64"):
        references.prepare(Image.new("RGB", (63, 100)))
    with pytest.raises(ValueError, match="at most 8 times"):
        references.prepare(Image.new("RGB", (64, 600)))


def test_grid_places_pictures_in_rows():
    images = np.stack([np.full((2, 3, 3), i, np.uint8) for i in range(3)])
    sheet = references.grid(images, 2)
    assert sheet.shape == (2 + 4 + 2, 3 + 4 + 3, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 7, 0] == 1 and sheet[6, 0, 0] == 2
    assert sheet[7, 9, 0] == 255
