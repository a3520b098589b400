"""Training from features made before is training on the fly, and their size is said first."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.data.loader import LoadError
from clvr_jax.data.plan import FILLING, Step, plan_groups
from clvr_jax.data.sources import open_source
from clvr_jax.generate.image import Networks
from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3.config import VARIANTS
from clvr_jax.models.qwen3.decoder import Decoder
from clvr_jax.sft.image.features import Features
from clvr_jax.sft.image.precompute import make, missing
from clvr_jax.weights import SafetensorsReader, WeightsError
from launch import toy_data as toy
from tests.sft.test_image import KEY, batches, first, model, program


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("toy"), count=2, steps=(1, 2), size=(64, 64))


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    """A folder with all features of the toy data, and what was said while they were made."""
    said = []
    folder = tmp_path_factory.mktemp("features") / "deeper" / "still"
    made = store(folder)
    make(made, work(made, file), model()[0], model()[1], 16, rows=2, say=said.append)
    return folder, said


def store(folder, **fields):
    names = {"text_encoder": "text-1", "vae": "vae-1", "dtype": jnp.float32, **fields}
    return Features(folder, model()[0], **names)


def work(features, file, **fields):
    own = batches(open_source(file))
    return missing(features, own.source, own.samples, own.tokenizer, own.rules, **fields)


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_training_from_features_has_the_same_losses(file, folder):
    _, params = model()
    on_the_fly = batches(open_source(file))
    from_disk = dataclasses.replace(on_the_fly, features=store(folder[0]))
    keys = [sample.static for sample in on_the_fly.samples]
    steps = plan_groups(keys, 1, 2, 0, 0)
    assert any(FILLING in step.rows for step in steps)
    for step in steps:
        live, stored = (
            program()(params["transformer"], {}, frozen, first(made(step)), KEY, static=step.static)
            for frozen, made in ((params, on_the_fly), ({}, from_disk))
        )
        # encoders inside and outside of the step's program may round differently
        for a, b in zip(jax.tree.leaves(live), jax.tree.leaves(stored), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_the_size_is_said_first_and_is_the_size_written(file, folder):
    written = sum(path.stat().st_size for path in files(folder[0]))
    assert len(folder[1]) == 1
    assert folder[1][0].startswith("3 text features and 3 latents to make, ")
    assert f" {written:,} bytes (0.00 GB); 0 are there" in folder[1][0]
    assert work(store(folder[0].with_name("none")), file).bytes == written


def test_shared_texts_and_pictures_are_stored_once(folder):
    # three samples and one reference, which is the target of another sample
    kinds = [path.relative_to(folder[0]).parts[0] for path in files(folder[0])]
    assert kinds == ["latents"] * 3 + ["text"] * 3


def test_nothing_is_made_twice_and_a_stopped_run_goes_on(file, folder, tmp_path):
    assert work(store(folder[0]), file).items == []
    copy = tmp_path / "copy"
    shutil.copytree(folder[0], copy)
    lost = files(copy)[0]
    lost.unlink()
    (lost.parent / f".{lost.name}.1.partial").write_bytes(b"half")  # a killed process leaves this
    todo = work(store(copy), file)
    assert len(todo.items) == 1 and todo.there == 5
    parts = [work(store(copy), file, part=(i, 2)) for i in range(2)]
    assert sum(len(part.items) for part in parts) == 1
    make(store(copy), todo, model()[0], model()[1], 16, rows=2, say=lambda text: None)
    for path in files(copy):
        same = folder[0] / path.relative_to(copy)
        assert path.read_bytes() == same.read_bytes(), path


def test_other_weights_or_types_are_other_features(file, folder):
    for fields in ({"text_encoder": "text-2"}, {"vae": "vae-2"}):
        assert len(work(store(folder[0], **fields), file).items) == 3
    half = work(store(folder[0], dtype=jnp.bfloat16), file)
    assert len(half.items) == 6
    with pytest.raises(LoadError, match=r"toy-0, image 1: .* has no text for it.*make the feat"):
        wrong = dataclasses.replace(
            batches(open_source(file)), features=store(folder[0], text_encoder="text-2")
        )
        wrong(Step(wrong.samples[0].static, np.array([[0]])))


def test_bfloat16_is_stored_as_such(tmp_path):
    features = store(tmp_path, dtype=jnp.bfloat16)
    array = np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    key = features.text_key(np.arange(4), 3)
    features.write(key, array)
    assert features.file(key).stat().st_size == features.file_size(((2, 3), features.dtype))
    with SafetensorsReader(features.file(key)) as reader:
        assert reader.tensors["features"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(features.read(key), array)


def test_a_full_disk_is_seen_before_anything_is_made(file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    said, features = [], store(tmp_path / "new")
    with pytest.raises(WeightsError, match=r"found 0\.00 GB free, expected .* GB"):
        make(features, work(features, file), *model(), 16, say=said.append)
    assert said and not files(tmp_path)
    half = store(tmp_path / "new", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"text_encoder is float32, .* to be bfloat16"):
        make(half, work(half, file), *model(), 16, say=said.append)


def test_the_empty_text_is_made_for_dropout(file, folder):
    todo = work(store(folder[0]), file, empty=True)
    lengths = {sample.static.text for sample in batches(open_source(file)).samples}
    assert len(todo.items) == len(lengths)  # one for each padded length


def test_a_sample_of_the_9b_model_takes_as_much_as_documented(tmp_path):
    nets = Networks(
        Transformer(TRANSFORMER_VARIANTS["klein_9b"]),
        Decoder(VARIANTS["qwen3_8b"]),
        Vae(VAE_VARIANTS["klein"]),
    )
    features = Features(tmp_path, nets, text_encoder="", vae="", dtype=jnp.bfloat16)
    text, latents, _ = features.specs(Layout(512, (64, 64), ((64, 64),)))
    assert features.file_size(text) == pytest.approx(512 * 12288 * 2, rel=1e-4)  # 12.6 MB
    assert features.file_size(latents) == pytest.approx(64 * 64 * 128 * 2, rel=1e-3)
