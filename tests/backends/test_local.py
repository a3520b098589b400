"""The local backend as its users meet it: turns, sessions, batches, limits."""

import threading

import numpy as np
import pytest

from clvr_jax.backends.local import engine as engines
from clvr_jax.backends.protocol import (
    InvalidRequest,
    Options,
    Overloaded,
    Session,
    Vlm,
    assistant,
    system,
    user,
)
from clvr_jax.generate import text
from tests.backends import toy

GREEDY = Options(max_tokens=24)
HOT = Options(max_tokens=24, temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def vlm():
    model = toy.load()
    yield model
    model.close()


def said(vlm, *turns, options=GREEDY) -> tuple[list[str], tuple[int, ...]]:
    """Replies and ids of a conversation in a session of its own."""
    session = vlm.start()
    replies = [session.ask(turn, options).text for turn in turns]
    ids = session.ids
    session.close()
    return replies, ids


def test_it_is_the_protocol(vlm):
    assert isinstance(vlm, Vlm)
    assert isinstance(vlm.start(), Session)
    assert vlm.name == "toy-vl" and vlm.context == 2048


def test_turns_are_counted_and_timed(vlm):
    session = vlm.start()
    first = session.ask([system("be brief"), user("look", toy.picture(1))], GREEDY)
    before = len(session.ids)
    second = session.ask([user("and now?", toy.picture(2, 64, 64))], GREEDY)
    assert first.usage.cached == 0 and first.usage.prompt + first.usage.completion == before
    assert second.usage.cached == before, "what was said must not be read again"
    assert second.usage.prompt > before
    for reply in (first, second):
        t = reply.times
        assert 0 <= t.queued <= t.first <= t.total and 0 < t.prefill < t.total
    session.close()


def test_earlier_ids_never_change(vlm):
    session = vlm.start()
    kept = ()
    for turn in range(4):
        session.ask([user(f"turn {turn}", toy.picture(turn, 64, 96))], HOT)
        assert session.ids[: len(kept)] == kept
        kept = session.ids
    session.close()


def test_unequal_prompts_together_say_what_they_say_alone(vlm):
    turns = [[user("x" * (3 * i), *[toy.picture(i)] * (i % 3), "?")] for i in range(8)]
    alone = [said(vlm, turn, options=HOT) for turn in turns]
    sessions = [vlm.start() for _ in turns]
    pending = [s.submit(turn, HOT) for s, turn in zip(sessions, turns)]
    together = [([p.result().text], s.ids) for p, s in zip(pending, sessions)]
    assert together == alone


def test_a_turn_taken_back_has_never_been(vlm):
    first, lost = [system("be brief"), user("look", toy.picture(1))], [user("x", toy.picture(2))]
    (_, told), ids = said(vlm, first, [user("and now?", toy.picture(3))])
    for evicted in (False, True):
        session = vlm.start()
        with pytest.raises(InvalidRequest, match="no turn to take back"):
            session.take_back()
        session.ask(first, GREEDY)
        before = len(session.ids)
        session.ask(lost, HOT)
        if evicted:
            vlm.engine.call(session._sequence.evict)
        session.take_back()
        assert len(session.ids) == before
        with pytest.raises(InvalidRequest, match="no turn to take back"):
            session.take_back()
        reply = session.ask([user("and now?", toy.picture(3))], GREEDY)
        assert reply.text == told and session.ids == ids
        assert reply.usage.cached == (0 if evicted else before)
        session.close()


def test_a_turn_that_runs_cannot_be_taken_back_and_a_lost_one_need_not(vlm):
    session = vlm.start()
    session.ask([user("look")], GREEDY)
    before = session.ids
    running = session.submit([user("go on")], Options(max_tokens=200))
    with pytest.raises(Overloaded):
        session.take_back()
    running.cancel()
    running.result()
    session.take_back()
    assert session.ids == before
    blocked = threading.Event()
    hold = threading.Thread(target=lambda: vlm.engine.call(blocked.wait))
    hold.start()
    waiting = session.submit([user("go on")], GREEDY)  # cancelled before it begins
    waiting.cancel()
    blocked.set()
    waiting.result()
    hold.join()
    session.take_back()
    assert session.ids == before
    session.close()


def test_a_seed_is_one_sample(vlm):
    turn = [user("tell")]
    options = [Options(max_tokens=24, temperature=1.0, seed=s) for s in (1, 2, 2**31 - 1)]
    texts = [said(vlm, turn, options=o) for o in options]
    assert texts == [said(vlm, turn, options=o) for o in options]
    assert len({ids for _, ids in texts}) == 3
    free = [vlm.start().ask(turn, Options(max_tokens=8, temperature=1.0)) for _ in range(3)]
    assert len({reply.seed for reply in free}) == 3
    again = vlm.start().ask(turn, Options(max_tokens=8, temperature=1.0, seed=free[0].seed))
    assert again.text == free[0].text


def test_pieces_join_to_the_text(vlm):
    pieces = []
    reply = vlm.start().ask([user("tell me more")], Options(max_tokens=60), pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == reply.text


def test_a_failing_listener_ends_nothing(vlm, caplog):
    def listen(piece):
        raise KeyError("mine")

    reply = vlm.start().ask([user("tell me more")], GREEDY, listen)
    assert reply.usage.completion == 24 or reply.finish == "stop"
    assert "a listener failed" in caplog.text


def test_free_text_asks_the_host_once_a_chunk(vlm, monkeypatch):
    calls = []
    real = text.decode
    monkeypatch.setattr(text, "decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    stops, vlm.processor.stops = vlm.processor.stops, (10**6,)
    try:
        reply = vlm.start().ask([user("go on")], Options(max_tokens=1 + 3 * text.CHUNK))
    finally:
        vlm.processor.stops = stops
    assert reply.usage.completion == 1 + 3 * text.CHUNK
    assert len(calls) == 1 + 3  # the first token comes alone


def test_stop_texts_end_a_turn_and_are_not_told(vlm):
    whole = vlm.start().ask([user("tell")], Options(max_tokens=60)).text
    stop = whole[10:13]
    cut = whole.index(stop)
    pieces = []
    session = vlm.start()
    options = Options(max_tokens=60, stop=("never there", stop))
    reply = session.ask([user("tell")], options, pieces.append)
    assert reply.finish == "stop" and reply.text == whole[:cut] == "".join(pieces)
    # what was generated behind it is forgotten: the next turn is that of the same ids read anew
    kept = len(session.ids)
    assert vlm.processor.decode(session.ids[-reply.usage.completion :]).startswith(whole[:cut])
    ids = session.ids
    later = session.ask([user("go on")], GREEDY)
    assert later.usage.cached == kept and session.ids[:kept] == ids
    vlm.engine.call(session._sequence.evict)
    again = session.ask([user("and?")], GREEDY)
    assert again.usage.cached == 0
    session.close()


def test_every_stop_token_ends_a_turn(vlm):
    ids = said(vlm, [user("tell")])[1]
    third = ids[-22]
    stops, vlm.processor.stops = vlm.processor.stops, (*vlm.processor.stops, third)
    try:
        session = vlm.start()
        reply = session.ask([user("tell")], GREEDY)
    finally:
        vlm.processor.stops = stops
    assert reply.finish == "stop" and session.ids[-1] == third
    assert reply.usage.completion <= 3


def test_length_limits(vlm):
    reply = vlm.start().ask([user("tell")], Options(max_tokens=5))
    assert reply.finish == "length" and reply.usage.completion == 5
    with pytest.raises(InvalidRequest, match=r"has \d+ tokens with this turn, the context holds"):
        vlm.start().submit([user("x" * 3000)])
    session = vlm.start()
    room = vlm.context - len(vlm.processor.first([{"role": "user", "parts": ["x" * 2000]}]).ids)
    reply = session.ask([user("x" * 2000)], Options(max_tokens=1000))
    assert reply.finish in ("length", "stop") and reply.usage.completion <= room
    assert len(session.ids) <= vlm.context


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"stop": ("",)},
        {"logprobs": 50},
        {"schema": {}, "grammar": "start: /a/"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidRequest):
        Options(**options)


def test_what_cannot_be_answered_is_said_before_any_work(vlm):
    session = vlm.start()
    with pytest.raises(InvalidRequest, match="no unfinished assistant turn to continue"):
        session.submit([])
    with pytest.raises(InvalidRequest, match="give pictures as pictures"):
        session.submit([user("<|image_pad|>")])
    with pytest.raises(InvalidRequest, match="at most 200 times the shorter"):
        session.submit([user(toy.picture().resize((2000, 4)))])
    with pytest.raises(InvalidRequest, match="the schema cannot be used"):
        session.submit([user("x")], Options(schema={"type": "no such type"}))
    with pytest.raises(InvalidRequest, match="the grammar cannot be used"):
        session.submit([user("x")], Options(grammar="start: ((("))
    assert session.ids == ()


def test_one_turn_at_a_time(vlm):
    session = vlm.start()
    pending = session.submit([user("tell")], Options(max_tokens=200))
    with pytest.raises(Overloaded, match="last turn is not done"):
        session.submit([user("more")])
    pending.result()
    session.ask([user("more")], GREEDY)


def test_cancelling_keeps_what_was_said(vlm):
    session, told = vlm.start(), threading.Event()
    stops, vlm.processor.stops = vlm.processor.stops, (10**6,)
    try:
        options = Options(max_tokens=1500)
        pending = session.submit([user("tell")], options, lambda _: told.set())
        told.wait(60)
        pending.cancel()
        reply = pending.result(60.0)
    finally:
        vlm.processor.stops = stops
    assert reply.finish == "cancelled" and 0 < reply.usage.completion < 1500
    assert len(session.ids) == reply.usage.prompt + reply.usage.completion
    assert session.ask([user("go on")], GREEDY).usage.cached == reply.usage.prompt + (
        reply.usage.completion
    )


def test_a_turn_can_be_continued(vlm):
    stops, vlm.processor.stops = vlm.processor.stops, (10**6,)
    try:
        whole = vlm.start()
        whole.ask([user("tell")], Options(max_tokens=30))
        parts = vlm.start()
        first = parts.ask([user("tell")], Options(max_tokens=10))
        rest = parts.ask([], Options(max_tokens=20))
    finally:
        vlm.processor.stops = stops
    assert parts.ids == whole.ids
    assert rest.usage.cached == first.usage.prompt + first.usage.completion - 1


def test_assistant_turns_can_be_given(vlm):
    session = vlm.start()
    session.ask([user("a"), assistant("b"), user("c")], GREEDY)
    shown = vlm.processor.tokenizer.decode(session.ids)
    assert shown.startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"
    )


def test_a_closed_session_and_a_closed_model_refuse():
    vlm = toy.load()
    session, other = vlm.start(), vlm.start()
    session.ask([user("x")], Options(max_tokens=2))
    session.close()
    with pytest.raises(Overloaded, match="closed"):
        session.submit([user("x")])
    running = other.submit([user("x")], Options(max_tokens=1500, seed=1, temperature=3.0))
    vlm.close()
    vlm.close()
    try:
        assert running.result(30.0).finish
    except Overloaded as error:
        assert "closed" in str(error)
    with pytest.raises(Overloaded):
        vlm.start().submit([user("x")])


def test_a_failed_turn_leaves_the_session_as_it_was(vlm, monkeypatch):
    session = vlm.start()
    session.ask([user("a", toy.picture())], GREEDY)
    before = session.ids
    expected = said(vlm, [user("a", toy.picture())], [user("b")])[1]

    def broken(*args, **fields):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(text, "prefill", broken)
        with pytest.raises(MemoryError):
            session.ask([user("b", toy.picture(3))], GREEDY)
    assert session.ids == before
    with monkeypatch.context() as patch:
        patch.setattr(text, "decode", broken)
        with pytest.raises(MemoryError):
            session.ask([user("b", toy.picture(3))], GREEDY)
    assert session.ids == before
    session.ask([user("b")], GREEDY)
    assert session.ids == expected


def test_penalties(vlm):
    """A heavy penalty on what was generated makes every token a new one."""
    stops, vlm.processor.stops = vlm.processor.stops, (10**6,)
    try:
        turn, seen = [user("aaaa")], {}
        for name, value in (("none", 1.0), ("repetition_penalty", 100.0)):
            fields = {} if name == "none" else {name: value}
            session = vlm.start()
            session.ask(turn, Options(max_tokens=60, **fields))
            seen[name] = session.ids[-60:]
        assert len(set(seen["none"])) < 60
        # with it, a token that occurs again does so only where all others occurred as well
        assert len(set(seen["repetition_penalty"])) > len(set(seen["none"]))
    finally:
        vlm.processor.stops = stops


def test_the_engine_reports_its_load(vlm):
    load = vlm.engine.load()
    assert load["running"] == load["waiting"] == 0
    assert 0 <= load["cache_bytes"] <= vlm.engine.cache_bytes


def test_budget_and_rows_are_checked_when_a_model_is_made():
    with pytest.raises(ValueError, match="raise the budget or lower the context"):
        toy.load(cache_bytes=2**20)
    with pytest.raises(ValueError, match="power of two"):
        toy.load(max_rows=6)


def test_admission_waits_for_room(vlm):
    """Twenty turns through eight rows, no one lost, at most eight at once."""
    most = 0
    real = engines.Batch.step

    def step(batch, tokens):
        nonlocal most
        most = max(most, len(batch.works))
        return real(batch, tokens)

    engines.Batch.step = step
    try:
        pending = [vlm.start().submit([user(f"n {i}")], HOT) for i in range(20)]
        replies = [p.result(120.0) for p in pending]
    finally:
        engines.Batch.step = real
    assert len(replies) == 20 and 1 < most <= 8
    assert all(np.isfinite(r.times.total) for r in replies)
