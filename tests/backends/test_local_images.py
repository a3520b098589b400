"""The local image model: what is drawn together, and what becomes of orders that cannot be."""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clvr_jax.backends.images import ImageGenerator, NotFinite, Order
from clvr_jax.backends.local import images as local
from clvr_jax.backends.protocol import Closed, InvalidRequest
from clvr_jax.generate import image as generation
from launch import build

SETTINGS = generation.Settings(height=64, width=64, steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def model():
    return build.load_image_model(build.inspect_weights("miniature"), dtype=jnp.float32)


@pytest.fixture
def images(model):
    images = local.LocalImages("mini", model, SETTINGS, (112, 32), batch=4)
    yield images
    images.close()


def reference(seed):
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(values)


def held(monkeypatch):
    """Hold the thread at its first batch; return what lets it go, and the batches drawn."""
    go, batches, draw = threading.Event(), [], local.LocalImages._draw

    def wait(self, taken):
        assert go.wait(60)
        batches.append([each.order.text for each in taken])
        draw(self, taken)

    monkeypatch.setattr(local.LocalImages, "_draw", wait)
    return go, batches


@pytest.mark.slow
def test_orders_of_one_shape_are_drawn_together_and_each_as_if_alone(images, model, monkeypatch):
    go, batches = held(monkeypatch)
    first = images.submit(Order("a red circle", (), 1))
    rest = [
        Order("a blue square", (), 2),
        Order("make the circle green", (reference(0),), 3),
        Order("remove the circle", (reference(1),), 2**32 - 1),
    ]
    futures = [images.submit(order) for order in rest]
    go.set()
    drawn = [first.result(120), *(future.result(120) for future in futures)]
    assert isinstance(images, ImageGenerator) and images.evaluations == 4
    assert [len(batch) for batch in batches] in ([1, 1, 2], [2, 2])
    for order, got in zip([Order("a red circle", (), 1), *rest], drawn, strict=True):
        refs = [np.asarray(each, np.float32) / 127.5 - 1 for each in order.references]
        settings = dataclasses.replace(SETTINGS, text_tokens=32)
        alone = generation.generate(model, [order.text], refs, [order.seed], settings)[0, 0]
        assert np.abs(np.asarray(got.picture).astype(int) - alone).max() <= 1
        assert got.evaluations == 4 and got.seconds > 0
    assert {each.together for each in drawn} == {len(batch) for batch in batches}


def test_batches_have_few_sizes(images, monkeypatch):
    """And texts that need more tokens are in others."""
    go, batches = held(monkeypatch)
    sizes, each = [], generation.generate_each
    monkeypatch.setattr(
        generation, "generate_each", lambda m, p, *rest: sizes.append(len(p)) or each(m, p, *rest)
    )
    futures = [images.submit(Order("a star", (), seed)) for seed in range(7)]
    futures.append(images.submit(Order("a blue square and " * 8 + "a star", (), 5)))
    go.set()
    assert len({np.asarray(future.result(120).picture).tobytes() for future in futures}) == 8
    assert sum(map(len, batches)) == 8 and max(map(len, batches)) == 4
    assert set(sizes) <= {1, 2, 4}


@pytest.mark.parametrize(
    "order, words",
    [
        (Order("a star " * 60), r"takes \d+ tokens, at most 112 are allowed"),
        (Order("a star", (Image.new("RGB", (20, 64)),)), "the reference is 20x64"),
        (Order("a star", (), 2**32), "the seed is 4294967296"),
    ],
)
def test_impossible_orders_are_refused_at_once(images, order, words):
    with pytest.raises(InvalidRequest, match=words):
        images.submit(order)


def test_a_picture_of_no_numbers_is_an_error_of_its_own(images, model, monkeypatch):
    whole = generation.generate_each
    monkeypatch.setattr(
        generation,
        "generate_each",
        lambda *given: (whole(*given)[0], np.array([seed != 7 for seed in given[3]])),
    )
    good, bad = (images.submit(Order("a star", (), seed)) for seed in (1, 7))
    assert good.result(120).picture.size == (64, 64)
    with pytest.raises(NotFinite, match="seed 7"):
        bad.result(120)


def test_what_breaks_reaches_who_waits_and_the_next_order_is_drawn(images, monkeypatch):
    def broken(*given):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate_each", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            images.submit(Order("a star")).result(60)
    assert images.submit(Order("a star")).result(120).picture.size == (64, 64)


def test_closing_cancels_what_waits(model, monkeypatch):
    images = local.LocalImages("mini", model, SETTINGS, (32,))
    go, _ = held(monkeypatch)
    futures = [images.submit(Order("a star", (), 0)), images.submit(Order("s", (reference(0),)))]
    closing = threading.Thread(target=images.close)
    closing.start()
    go.set()
    closing.join(120)
    assert not closing.is_alive() and all(future.done() for future in futures)
    assert futures[1].cancelled()
    images.close()
    with pytest.raises(Closed, match="mini has been closed"):
        images.submit(Order("a star"))


def test_batches_are_powers_of_two(model):
    with pytest.raises(ValueError, match="batch is 6; it must be a power of two"):
        local.LocalImages("mini", model, SETTINGS, (32,), batch=6)
    with pytest.raises(ValueError, match="no text lengths"):
        local.LocalImages("mini", model, SETTINGS, ())
