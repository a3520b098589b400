"""Turns that are given up, callbacks in the engine's own thread, weights that are broken."""

import threading

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.backends.protocol import Closed, Options, user
from tests.backends import toy

LONG = Options(max_tokens=1500, temperature=3.0, seed=1)


@pytest.fixture(scope="module")
def vlm():
    model = toy.load(max_rows=1)  # a second turn waits
    model.processor.stops = (10**6,)
    yield model
    model.close()


def test_a_session_closed_while_it_runs_or_waits_settles_its_turn(vlm):
    begun = threading.Event()
    first, second = vlm.start(), vlm.start()
    running = first.submit([user("a")], LONG, lambda _: begun.set())
    waiting = second.submit([user("b")], LONG)
    begun.wait(60)
    assert vlm.load()["running"] == 1 and vlm.load()["waiting"] == 1
    second.close()
    first.close()
    for pending in (running, waiting):
        assert pending.result(60.0).finish == "cancelled"
    assert waiting.result(1.0).usage.completion == 0
    assert vlm.start().ask([user("c")], Options(max_tokens=3)).usage.completion == 3
    assert first._sequence.cache is None and second._sequence.cache is None


def test_a_done_callback_may_go_on_and_close(vlm):
    """It runs in the engine's thread: what it asks for must not wait for that thread."""
    session, ended = vlm.start(), threading.Event()
    found = {}

    def again(pending):
        found["first"] = pending.result(0.0)
        session.submit([user("b")], Options(max_tokens=3)).add_done_callback(last)

    def last(pending):
        found["second"] = pending.result(0.0)
        found["score"] = session.score([user("c")], ["x"])[0]
        session.close()
        ended.set()

    session.submit([user("a")], Options(max_tokens=3)).add_done_callback(again)
    assert ended.wait(60), "the engine waits for itself"
    assert found["second"].usage.cached == found["first"].usage.prompt + 3
    assert found["score"].logprob < 0
    with pytest.raises(Closed):
        session.submit([user("d")])


def test_a_model_may_be_closed_from_a_callback():
    model = toy.load()
    ended = threading.Event()

    def close(pending):
        model.close()
        ended.set()

    model.start().submit([user("a")], Options(max_tokens=2)).add_done_callback(close)
    assert ended.wait(60)
    model.close()
    with pytest.raises(Closed):
        model.start().submit([user("a")])


def test_broken_weights_are_an_error_not_words():
    model = toy.load()
    try:
        params = model.engine._reader._params["language"]
        norm = params["norm"]["scale"]
        params["norm"]["scale"] = jax.device_put(jnp.full_like(norm, jnp.nan), norm.sharding)
        session = model.start()
        with pytest.raises(RuntimeError, match="not finite"):
            session.ask([user("a")], Options(max_tokens=3))
        params["norm"]["scale"] = norm
        assert session.ids == ()
        assert session.ask([user("a")], Options(max_tokens=3)).usage.completion <= 3
    finally:
        model.close()


def test_reservations_count_a_turn_once(vlm):
    """A running turn needs its prompt and its limit, whatever it has written by now."""
    session, told = vlm.start(), threading.Event()
    pending = session.submit([user("a" * 50)], LONG, lambda _: told.set())
    told.wait(60)
    works = vlm.engine.call(lambda: list(vlm.engine._batch.works))
    assert [w.places for w in works] == [works[0].prompt + works[0].limit]
    pending.cancel()
    pending.result(60.0)
