"""What must hold when threads meet, calls fail, memory is short and conversations are long."""

import concurrent.futures
import itertools
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.backends.local import engine as engines
from clvr_jax.backends.local import grammar as grammars
from clvr_jax.backends.local import reader as readers
from clvr_jax.backends.protocol import Options, Overloaded, user
from clvr_jax.generate import text
from clvr_jax.models.qwen3.cache import KV
from tests.backends import toy

LONG = Options(max_tokens=1500, temperature=3.0, seed=1)
SHORT = Options(max_tokens=3)
WAIT = 60.0


@pytest.fixture(scope="module")
def vlm():
    model = toy.load()
    model.processor.stops = (10**6,)  # turns end at their limits
    yield model
    model.close()


@pytest.fixture
def pieces(monkeypatch):
    """Conversations are read 32 tokens at a time."""
    monkeypatch.setattr(readers, "PIECE", 32)
    monkeypatch.setattr(engines, "PIECE", 32)


def running(vlm, options=LONG):
    """A session, and its turn that has said something."""
    session, told = vlm.start(), threading.Event()
    pending = session.submit([user("go")], options, lambda _: told.set())
    assert told.wait(WAIT)
    return session, pending


def stop(*pending):
    for one in pending:
        one.cancel()
        one.result(WAIT)


@pytest.mark.parametrize("first", ["submit", "score"])
def test_two_threads_do_not_have_one_session_at_once(vlm, monkeypatch, first):
    """The second comes while the first still prepares its pictures."""
    session = vlm.start()
    session.ask([user("a")], SHORT)
    inside, go_on = threading.Event(), threading.Event()
    real = vlm.processor.later

    def slow(*args):
        inside.set()
        assert go_on.wait(WAIT)
        return real(*args)

    monkeypatch.setattr(vlm.processor, "later", slow)
    tasks = {
        "submit": lambda: session.ask([user("b")], SHORT),
        "score": lambda: session.score([user("b")], ["x"]),
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        one = pool.submit(tasks[first])
        assert inside.wait(WAIT)
        threading.Timer(0.5, go_on.set).start()
        try:
            for task in tasks.values():
                with pytest.raises(Overloaded, match="not done"):
                    task()
        finally:
            go_on.set()
        one.result(WAIT)
    assert session.ask([user("c")], SHORT).usage.completion == 3
    with pytest.raises(ValueError, match="give pictures as pictures"):
        session.submit([user("<|image_pad|>")])
    session.ask([user("a refused turn leaves the session free")], SHORT)


def test_a_turn_is_cancelled_wherever_it_waits():
    model = toy.load(max_rows=1)
    model.processor.stops = (10**6,)
    try:
        _, busy = running(model)
        second, third = (model.start().submit([user("b")], LONG) for _ in range(2))
        third.cancel()
        assert third.result(WAIT).finish == "cancelled"
        assert model.load() | {"cache_bytes": 0} == {
            "running": 1,
            "waiting": 1,
            "cache_bytes": 0,
            "evictions": 0,
        }
        stop(second, busy)
    finally:
        model.close()


def test_a_turn_cancelled_before_its_first_token_is_forgotten(vlm, pieces, monkeypatch):
    """While it waits or while it is read: the session is as it was."""
    twin, session = vlm.start(), vlm.start()
    for one in (twin, session):
        one.ask([user("a", toy.picture())], SHORT)
    before = session.ids
    pending, calls = [], []
    real = text.prefill

    def prefill(*args, **fields):
        calls.append(1)
        out = real(*args, **fields)
        pending[0].cancel()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(text, "prefill", prefill)
        vlm.engine.call(
            lambda: pending.append(session.submit([user("b" * 300, toy.picture(2))], LONG))
        )
        reply = pending[0].result(WAIT)
    assert len(calls) == 1, "reading went on"
    assert reply.finish == "cancelled" and reply.usage.completion == 0 and reply.text == ""
    assert session.ids == before
    reply = session.ask([user("c")], SHORT)
    assert reply.usage.cached == len(before)
    twin.ask([user("c")], SHORT)
    assert session.ids == twin.ids


def test_a_long_conversation_is_read_between_the_tokens_of_others(vlm, pieces, monkeypatch):
    expected = vlm.start()
    expected.ask([user("b" * 600)], SHORT)
    calls = []

    def watch(name):
        real = getattr(text, name)
        monkeypatch.setattr(text, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    _, busy = running(vlm)
    watch("prefill")
    watch("decode")
    session = vlm.start()
    session.ask([user("b" * 600)], SHORT)
    stop(busy)
    assert session.ids == expected.ids
    reads = [i for i, name in enumerate(calls) if name == "prefill"]
    assert len(reads) > 15
    assert all(b - a > 1 for a, b in itertools.pairwise(reads)), "others waited for all of it"


def test_a_failure_between_calls_does_not_end_the_engine(vlm, monkeypatch):
    def broken(*args):
        monkeypatch.undo()
        raise MemoryError("no room")

    session, pending = running(vlm)
    monkeypatch.setattr(engines.Batch, "shrink", broken)
    with pytest.raises(MemoryError):
        pending.result(WAIT)
    assert session.ids == () and session.ask([user("b")], SHORT).usage.completion == 3


def test_a_reply_does_not_fail_because_its_cache_cannot_be_kept(vlm, monkeypatch):
    def broken(*args):
        raise MemoryError("no room")

    _, busy = running(vlm)
    session = vlm.start()
    with monkeypatch.context() as patch:
        patch.setattr(text, "extract", broken)
        assert session.ask([user("b")], SHORT).usage.completion == 3
    stop(busy)
    reply = session.ask([user("c")], SHORT)
    assert reply.usage.cached == 0 and reply.usage.completion == 3


def test_waiting_for_a_turn_in_the_engines_own_thread_is_an_error(vlm):
    session, found = vlm.start(), concurrent.futures.Future()

    def again(_):
        try:
            found.set_result(session.ask([user("b")], SHORT))
        except RuntimeError as error:
            found.set_exception(error)

    session.submit([user("a")], SHORT).add_done_callback(again)
    with pytest.raises(RuntimeError, match="done callback"):
        found.result(WAIT)


def test_a_closed_model_keeps_no_caches():
    model = toy.load()
    session = model.start()
    session.ask([user("a")], SHORT)
    assert session._sequence.cache is not None
    model.close()
    assert session._sequence.cache is None and model.load()["cache_bytes"] == 0


def watched(model, monkeypatch) -> list[int]:
    """What all caches took, in every round."""
    sizes = []
    real = engines.Batch.step

    def step(batch, tokens):
        out = real(batch, tokens)
        sizes.append(model.load()["cache_bytes"])
        return out

    monkeypatch.setattr(engines.Batch, "step", step)
    return sizes


def test_rows_are_added_within_the_budget(monkeypatch):
    """A long turn has gone, short ones stay: its places must not be multiplied by new rows."""
    model = toy.load(context=512, cache_bytes=3 * 2**20)  # 3072 places
    model.processor.stops = (10**6,)
    sizes = watched(model, monkeypatch)
    turns = [([user("x" * 400)], 3)] + [([user("x")], 90)] * 8
    try:
        pending = model.engine.call(
            lambda: [model.start().submit(m, Options(max_tokens=n)) for m, n in turns]
        )
        assert all(p.result(WAIT).finish == "length" for p in pending)
    finally:
        model.close()
    assert max(sizes) <= 3 * 2**20


@pytest.mark.slow
def test_a_crowd_stays_within_the_budget_and_says_what_it_says_alone(monkeypatch):
    """Sessions of all lengths come, go on, are cancelled and closed while memory is short."""
    rng = random.Random(0)
    plans = [
        [("x" * rng.choice([1, 40, 150]), rng.choice([3, 40, 120])) for _ in range(3)]
        for _ in range(14)
    ]
    roomy = toy.load(context=1024)
    tight = toy.load(context=1024, cache_bytes=4 * 2**20)
    for model in (roomy, tight):
        model.processor.stops = (10**6,)
    sizes = watched(tight, monkeypatch)

    def converse(model, plan):
        session = model.start()
        for words, tokens in plan:
            session.ask([user(words)], Options(max_tokens=tokens, temperature=1.0, seed=tokens))
        return session.ids

    def disturb(seed):
        order = random.Random(seed)
        for _ in range(6):
            session = tight.start()
            pending = session.submit([user("y" * order.choice([1, 300]))], LONG)
            if order.random() < 0.5:
                pending.cancel()
            else:
                session.close()
            assert pending.result(WAIT).finish == "cancelled"

    try:
        alone = [converse(roomy, plan) for plan in plans]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            disturbed = [pool.submit(disturb, seed) for seed in range(2)]
            together = list(pool.map(lambda plan: converse(tight, plan), plans))
            for one in disturbed:
                one.result(WAIT)
    finally:
        roomy.close()
        tight.close()
    assert together == alone
    assert tight.engine.evictions > 0
    assert max(sizes) <= 4 * 2**20


def test_a_grammar_that_gives_up_fails_its_own_turn_only(vlm, monkeypatch):
    matcher = vlm._grammars.compile(Options(grammar='start: "yes" | "no"'))
    matcher._matcher.consume_token(vlm.processor.tokenizer.encode("x")[0])
    with pytest.raises(RuntimeError, match="the grammar cannot go on"):
        matcher.mask()  # llguidance itself would allow the end of the turn

    real = grammars.Matcher.push

    def push(self, token):
        real(self, token)
        self._matcher = matcher._matcher  # given up

    _, busy = running(vlm)
    constrained = vlm.start()
    monkeypatch.setattr(grammars.Matcher, "push", push)
    with pytest.raises(RuntimeError, match="the grammar cannot go on"):
        constrained.ask([user("x")], Options(grammar='start: "yes" | "no"'))
    assert constrained.ids == ()
    assert not busy.future.done()
    stop(busy)


def test_any_number_of_tokens_may_end_a_turn(vlm):
    stops, vlm.processor.stops = vlm.processor.stops, tuple(range(10**6, 10**6 + 6))
    try:
        assert vlm.start().ask([user("a")], SHORT).usage.completion == 3
    finally:
        vlm.processor.stops = stops


def rows(count: int, places: int, fill: float) -> text.Rows:
    """A batch of one layer, one head."""
    none = np.zeros(count, np.int32)
    names = ("lengths", "position", "scores", "seen", "counts", "step", "limit", "stops", "active")
    cache = KV(*(jnp.full((count, 1, places, 2), fill) for _ in range(2)))
    return text.Rows(cache=(cache,), sampling=(), **dict.fromkeys(names, none))


def test_a_new_row_takes_nothing_over_from_the_old_one():
    """Zero times not-a-number is not a number: places behind the new row's are read as well."""
    out = text.insert(rows(2, 8, jnp.nan), rows(1, 4, 1.0), 1)
    np.testing.assert_array_equal(out.cache[0].keys[1, 0, :, 0], [1.0] * 4 + [0.0] * 4)


def test_a_batch_grows_layer_by_layer():
    """The old cache goes as the new one comes: the two of them would not fit the budget."""
    old = rows(2, 4, 1.0)
    new = text.regroup(old, np.array([1, -1, 0, -1]), 8)
    assert new.cache[0].keys.shape[::2] == (4, 8)
    assert all(x.is_deleted() for x in jax.tree.leaves(old.cache))
