"""Samples, batches and loss of the image model's fine-tuning at toy width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from clvr_jax import lora, parallel
from clvr_jax.data.buckets import Buckets
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.loader import LoadError, load
from clvr_jax.data.plan import FILLING, Epochs, Step, plan_groups
from clvr_jax.data.sources import open_source
from clvr_jax.diffusion.path import TimeSampling
from clvr_jax.generate.image import Networks, encode_image
from clvr_jax.generate.image import encode_text as generated_text
from clvr_jax.generate.prompt import render, tokenize
from clvr_jax.generate.references import prepare
from clvr_jax.models.flux2.config import STACKED
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3.decoder import Decoder
from clvr_jax.sft.image import pictures
from clvr_jax.sft.image.batches import Batches
from clvr_jax.sft.image.loss import Settings, loss, noised
from clvr_jax.sft.image.samples import Rules, index
from clvr_jax.tree import flatten
from launch import toy_data as toy
from launch.toy import byte_tokenizer, random_weights

BUCKETS = Buckets(areas=(64 * 64,), aspects=(1.0, 1.5), sizes=((96, 64), (64, 96)), enlarge=1.0)
RULES = Rules(Policy(text="instruction", buckets=(112, 128)), BUCKETS)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(toy.make(tmp_path_factory.mktemp("toy"), count=3, steps=(1, 2, 3)))


@functools.cache
def model():
    """Networks and float32 parameters."""
    weights = random_weights(0)
    text = weights["text_encoder"][0].as_text_encoder()
    nets = Networks(Transformer(weights["transformer"][0]), Decoder(text), Vae(weights["vae"][0]))
    params = {name: jax.tree.map(jnp.asarray, tree) for name, (_, tree) in weights.items()}
    layers = params["text_encoder"]["layers"]
    params["text_encoder"]["layers"] = jax.tree.map(lambda x: x[: text.layers], layers)
    return nets, params


@functools.cache
def program(settings=None):
    nets, _ = model()
    settings = settings or Settings()
    return jax.jit(
        functools.partial(loss, networks=nets, settings=settings), static_argnames="static"
    )


def batches(source, rules=RULES, **fields):
    tokenizer = byte_tokenizer()
    return Batches(source, index(source, tokenizer, rules), tokenizer, rules, **fields)


def first(arrays):
    """The first micro-batch."""
    return jax.tree.map(lambda x: x[0], arrays)


def test_every_picture_is_a_sample_of_its_layout(source):
    samples = index(source, byte_tokenizer(), RULES)
    assert [(s.trajectory, s.step) for s in samples] == [
        (0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)
    ]  # fmt: skip
    # toy pictures are 64x64, 96x64, 64x96 (width first), the policy gives all earlier ones
    assert samples[2].static.noise == (4, 6) and samples[2].static.references == ((4, 6),)
    assert samples[5].static.noise == (6, 4) and samples[5].static.references == ((6, 4), (6, 4))
    assert {s.static.text for s in samples} <= {112, 128}


def test_a_batch_holds_what_inference_would_be_given(source):
    made = batches(source)
    i = 2  # trajectory 1, its second picture
    layout = made.samples[i].static
    arrays = made(Step(layout, np.array([[i], [FILLING]])))
    assert arrays["weights"].tolist() == [[1], [0]]
    prompt = source[1].steps[1].action.prompt.replace("<IMG_GEN_1>", "image 1")
    ids, lengths = tokenize(byte_tokenizer(), [prompt], layout.text)
    np.testing.assert_array_equal(arrays["ids"][0, 0], ids[0])
    assert arrays["lengths"][0, 0] == lengths[0] == len(byte_tokenizer().encode(render(prompt)))
    images = [np.asarray(Image.open(source[1].steps[n].image)) for n in range(2)]
    np.testing.assert_array_equal(arrays["pixels"][0, 0], images[1])  # of a bucket's size: as it is
    np.testing.assert_array_equal(arrays["reference_pixels"][0][0, 0], images[0])
    # filling is finite and empty
    assert arrays["pixels"][1].max() == 0 and arrays["lengths"][1, 0] > 0
    # the device sees the numbers that inference prepares
    seen = jnp.asarray(images[0]).astype(jnp.float32) / 255.0 * 2.0 - 1.0
    np.testing.assert_allclose(seen, prepare(Image.fromarray(images[0])), atol=1e-6)


def test_features_of_the_loss_are_those_of_inference(source):
    nets, params = model()
    made = batches(source)
    arrays = first(made(Step(made.samples[2].static, np.array([[2]]))))
    from clvr_jax.sft.image.loss import conditions

    text, x0, references = jax.jit(lambda p, b: conditions(p, b, nets))(params, arrays)
    image = lambda pixels: pixels.astype(np.float32) / 255 * 2 - 1
    grid = encode_image(nets, params["vae"], image(arrays["pixels"]), jnp.float32)
    np.testing.assert_allclose(x0, grid.reshape(1, -1, grid.shape[-1]), atol=1e-5)
    grid = encode_image(nets, params["vae"], image(arrays["reference_pixels"][0]), jnp.float32)
    np.testing.assert_allclose(references[0], grid.reshape(1, -1, grid.shape[-1]), atol=1e-5)
    expected = generated_text(nets, params["text_encoder"], arrays["ids"], arrays["lengths"])
    np.testing.assert_allclose(text, expected, atol=1e-5)


def test_references_are_prepared_from_their_buckets(tmp_path):
    Image.new("RGB", (1700, 1300)).save(tmp_path / "a.png")
    buckets = Buckets(areas=(1280 * 1280,), aspects=(1.0, 4 / 3))
    target = pictures.target(str(tmp_path / "a.png"), buckets)
    assert target.bucket == target.size == (1104, 1472)
    reference = pictures.reference(str(tmp_path / "a.png"), buckets)
    image = Image.new("RGB", (1472, 1104))
    assert reference.bucket == (1104, 1472) and reference.size == prepare(image).shape[:2]
    assert pictures.read_pixels(reference, 16).shape == (*reference.size, 3)


def test_reference_pixels_survive_their_preparation(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    picture = pictures.Picture(str(tmp_path / "a.png"), (80, 64), (80, 64))
    np.testing.assert_array_equal(pictures.read_pixels(picture, 16), noise)
    cut = pictures.Picture(str(tmp_path / "a.png"), (80, 64), (64, 64))  # at a factor of 64
    np.testing.assert_array_equal(pictures.read_pixels(cut, 64), noise[8:72])


def given(layout, rows):
    """A micro-batch of made-up features, for which neither encoder is compiled."""
    nets, _ = model()
    normal = lambda *shape: np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
    channels, width = nets.transformer.cfg.channels, nets.transformer.cfg.text_width
    return {
        "weights": np.ones(rows, np.float32),
        "text": normal(rows, layout.text, width),
        "latents": normal(rows, *layout.noise, channels),
        "reference_latents": [normal(rows, *size, channels) for size in layout.references],
    }


def test_rows_count_by_their_weight_and_by_noise_level():
    _, params = model()
    layout = Layout(8, (4, 4))
    settings = Settings(TimeSampling("uniform", shift=1, weighting="bell"))
    run = lambda weights: program(settings)(
        params["transformer"], {}, {}, given(layout, 2) | {"weights": np.float32(weights)}, KEY,
        static=layout,
    )  # fmt: skip
    (a, one, aux), (b, _, _), (both, two, _) = run([1, 0]), run([0, 1]), run([1, 1])
    assert one == 1 and two == 2 and a != b and both == pytest.approx(float(a + b), rel=1e-6)
    bins = {name: pair for name, pair in aux.items() if name != "error"}
    assert list(bins) == ["loss_t0", "loss_t1", "loss_t2", "loss_t3"]
    assert sum(float(count) for _, count in bins.values()) == 1
    total = sum(float(value) for value, _ in bins.values())
    assert total == pytest.approx(float(aux["error"][0])) != float(a)  # the bell is not in it


@pytest.mark.slow
def test_adapters_change_the_loss_and_have_gradients():
    nets, params = model()
    layout = Layout(8, (4, 4), ((2, 3),))
    run = jax.jit(
        lambda adapters: loss(
            params["transformer"], adapters, {}, given(layout, 2), KEY, layout,
            networks=nets, settings=Settings(),
        )[0]
    )  # fmt: skip
    adapters = lora.init(KEY, params["transformer"], "single_blocks/.*kernel", 2, STACKED)
    assert run(adapters) == pytest.approx(float(run({})), rel=1e-6)
    for path, leaf in flatten(jax.grad(run)(adapters)).items():
        assert path.endswith("/a") or jnp.any(leaf != 0)  # b is zero, so that a has no gradient yet


@pytest.mark.slow
def test_a_mesh_changes_nothing(source, mesh_2x2x2):
    _, params = model()
    made = batches(source)
    layout = made.samples[2].static
    batch = first(made(Step(layout, np.array([[2, 2, FILLING, 2]]))))
    run = lambda params, batch: program()(
        params["transformer"], {}, params, batch, KEY, static=layout
    )
    total, weight, aux = run(params, batch)
    place = lambda tree: jax.device_put(tree, parallel.shardings(tree, mesh_2x2x2))
    with jax.set_mesh(mesh_2x2x2):
        rows = NamedSharding(mesh_2x2x2, PartitionSpec(("data", "fsdp")))
        many = run(
            {name: place(tree) for name, tree in params.items()}, jax.device_put(batch, rows)
        )
    assert many[0] == pytest.approx(float(total), rel=1e-5) and many[1] == weight == 3
    for name, pair in many[2].items():
        np.testing.assert_allclose(pair, aux[name], rtol=1e-5)


def test_draws_depend_on_the_key_alone():
    _, params = model()
    layout = Layout(8, (4, 4))
    run = lambda key: program()(
        params["transformer"], {}, {}, given(layout, 2), key, static=layout
    )[0]
    assert run(KEY) == run(KEY) != run(jax.random.key(1))


def test_references_are_noised_each_to_a_level_of_its_own():
    _, params = model()
    run = lambda layout, **more: program(Settings(**more))(
        params["transformer"], {}, {}, given(layout, 2), KEY, static=layout
    )[0]
    alone, edit = Layout(8, (4, 4)), Layout(8, (4, 4), ((4, 4), (2, 3)))
    assert run(alone, reference_noise=0.3) == run(alone)
    assert run(edit, reference_noise=0.3) != run(edit)
    clean = [jnp.ones((6, count, 500)) for count in (16, 6)]
    made = noised(clean, KEY, 0.3)
    levels = np.array([(np.asarray(z) - 1).std((1, 2)) for z in made])
    assert (levels < 0.32).all() and len(np.unique(levels.round(4))) == levels.size
    assert 0.05 < levels.mean() < 0.25
    for again, other, z in zip(
        noised(clean, KEY, 0.3), noised(clean, jax.random.key(1), 0.3), made
    ):
        np.testing.assert_array_equal(again, z)
        assert (np.asarray(other) != z).all()
    with pytest.raises(ValueError, match=r"reference_noise is -0\.1; it is 0 or more"):
        Settings(reference_noise=-0.1)


def test_dropout_is_drawn_for_each_sample_and_epoch(source):
    with_dropout = batches(source, dropout=0.4, seed=5)
    drops = np.array([[with_dropout.dropped(i, e) for i in range(300)] for e in range(4)])
    assert abs(drops.mean() - 0.4) < 0.05
    assert len({tuple(row) for row in drops}) == 4
    i = int(np.argmax(drops[1][:6]))
    assert drops[1][i]
    layout = with_dropout.samples[i].static
    arrays = with_dropout(Step(layout, np.array([[i]]), epoch=1))
    empty, length = tokenize(byte_tokenizer(), [""], layout.text)
    np.testing.assert_array_equal(arrays["ids"][0, 0], empty[0])
    assert arrays["lengths"][0, 0] == length[0]
    assert not any(batches(source).dropped(i, e) for i in range(50) for e in range(3))


def test_a_run_reads_every_sample_once_an_epoch(source):
    made = batches(source)
    keys = [sample.static for sample in made.samples]
    run = Epochs(lambda epoch: plan_groups(keys, 1, 2, 0, epoch), epochs=2)
    with load(run, made, threads=2) as loaded:
        weights = [batch.arrays["weights"].sum() for batch in loaded]
    assert sum(weights) == 2 * len(keys) and len(weights) == len(run)
    halves = [dataclasses.replace(made, process=(i, 2))(run[0]) for i in range(2)]
    whole = made(run[0])
    for name in ("weights", "ids", "pixels"):
        both = np.concatenate([half[name] for half in halves], axis=1)
        np.testing.assert_array_equal(both, whole[name])


def test_rejected_pictures_are_looked_at_but_not_learnt(tmp_path):
    file = toy.make(tmp_path, count=1, steps=3)
    text = file.read_text().replace('1.png"', '1.png", "verdict": "rejected"', 1)
    file.write_text(text)
    samples = index(open_source(file), byte_tokenizer(), RULES)
    assert [s.step for s in samples] == [1, 2] and len(samples[0].static.references) == 1
    kept = index(open_source(file), byte_tokenizer(), dataclasses.replace(RULES, rejected=True))
    assert len(kept) == 3


def test_unusable_samples_are_all_named(tmp_path):
    file = toy.make(tmp_path, count=2, steps=2)
    Image.new("RGB", (40, 40)).save(tmp_path / "toy-0" / "2.png")
    (tmp_path / "toy-1" / "1.png").unlink()
    with pytest.raises(ValueError) as got:
        index(open_source(file), byte_tokenizer(), RULES)
    text = str(got.value)
    assert "trajectory toy-0, image 2: " in text and "40x40, too small for every bucket" in text
    assert "trajectory toy-1, image 1: " in text and "does not exist" in text
    assert "trajectory toy-1, image 2: " in text  # its reference
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"trajectories.jsonl:3: "):  # a broken record
        index(open_source(file), byte_tokenizer(), RULES)
    short = dataclasses.replace(RULES, policy=Policy(text="instruction", buckets=(32,)))
    file = toy.make(tmp_path, count=1, steps=1)
    with pytest.raises(ValueError, match=r"image 1: .*tokens, at most 32 are allowed"):
        index(open_source(file), byte_tokenizer(), short)


def test_data_that_changed_since_the_plan_is_named(tmp_path):
    file = toy.make(tmp_path, count=1, steps=1)
    made = batches(open_source(file))
    Image.new("RGB", (96, 64)).save(tmp_path / "toy-0" / "1.png")
    step = Step(made.samples[0].static, np.array([[0]]))
    with pytest.raises(
        LoadError, match=r"toy-0, image 1: .*\(64, 96\)\], \[\(64, 64\)\] were planned"
    ):
        made(step)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        batches(open_source(file), dropout=1.0)
