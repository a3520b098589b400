"""Concurrency, rates, budgets, cancelling and closing."""

import threading
import time

import pytest

from clvr_jax.backends.protocol import Options, Overloaded, user
from clvr_jax.backends.remote import BudgetExceeded, RemoteError
from clvr_jax.backends.remote.limits import Bucket, Limits
from tests.backends.remote.chat_server import broken_stream, fail, gated_stream, say, wait_for_gate

ASK = [user("x")]
SHORT = Options(max_tokens=5)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_are_in_flight_than_allowed(server, connect, limit):
    server.default = say("ok", seconds=0.03)
    vlm = connect(max_in_flight=limit)
    turns = [vlm.start().submit(ASK) for _ in range(9)]
    assert [turn.result().text for turn in turns] == ["ok"] * 9
    assert server.most_at_once == limit


def test_a_bucket_lets_a_burst_go_and_then_its_rate():
    now = [100.0]
    bucket = Bucket(60.0, 2.0, lambda: now[0])
    assert [bucket.take(1.0) for _ in range(4)] == [0, 0, 1, 2]
    now[0] += 2
    assert bucket.take(1.0) == 1  # the two above have taken what came since
    now[0] += 1000
    assert [bucket.take(1.0) for _ in range(3)] == [0, 0, 1]  # no more than two were saved up


def test_more_than_a_bucket_holds_goes_when_it_is_full():
    now = [0.0]
    bucket = Bucket(60.0, 2.0, lambda: now[0])
    assert bucket.take(10.0) == 0
    assert bucket.take(1.0) == 9
    bucket.give_back(8.0)
    assert bucket.take(1.0) == 2


def test_requests_are_spread_over_the_minute(server, connect):
    vlm = connect(requests_per_minute=30.0, max_in_flight=1)  # three at once, one each 2 s
    for _ in range(5):
        vlm.start().ask(ASK)
    assert vlm.delays == pytest.approx([2, 4], abs=0.5)


def test_retries_count_for_the_rate(server, connect):
    server.script += [fail(500)]
    vlm = connect(requests_per_minute=6.0, first_delay=0.25)
    vlm.start().ask(ASK)
    assert vlm.delays == pytest.approx([0.25, 10], abs=0.3)


def test_the_rate_is_kept_in_real_time(server, connect):
    vlm = connect(pause=threading.Event.wait, requests_per_minute=100.0, max_in_flight=11)
    turns = [vlm.start().submit(ASK) for _ in range(11)]  # ten at once, then one each 0.6 s
    assert all(turn.result().text == "ok" for turn in turns)
    assert server.times[-1] - server.times[0] > 0.3


def test_tokens_are_limited_and_corrected_by_what_was_used():
    now = [0.0]
    waits = []
    limits = Limits(None, 6000.0, lambda: now[0], lambda stop, seconds: waits.append(seconds))
    stop = threading.Event()
    limits.admit(600, stop)  # all that may go at once
    limits.admit(100, stop)
    limits.correct(600, 100)  # 500 come back: 400 are there
    limits.admit(400, stop)
    limits.admit(200, stop)
    assert waits == [1.0, 2.0]


def test_tokens_per_minute_hold_requests_back(server, connect):
    server.default = say("ok", usage=(50, 50))
    vlm = connect(tokens_per_minute=1000.0)  # a hundred at once
    for _ in range(3):
        vlm.start().ask(ASK, SHORT)
    first, second = vlm.delays  # at most 9 + 100 tokens at 1000 a minute
    assert 0 < first <= 0.7 and 5 < second < 7.5


def test_a_budget_of_money_stops_before_sending(server, connect):
    server.default = say("ok", usage=(0, 5))
    vlm = connect(price_output=1e5, budget_cost=1.2)  # half a dollar each
    vlm.start().ask(ASK, SHORT)
    session = vlm.start()
    session.ask(ASK, SHORT)
    with pytest.raises(BudgetExceeded, match=r"\$1.0000 of \$1.2; it may take up to \$0.5"):
        session.ask([user("y")], SHORT)
    assert len(server.bodies) == 2 and vlm.totals().cost == pytest.approx(1.0)
    with pytest.raises(BudgetExceeded):
        vlm.start().submit(ASK, SHORT).result()
    assert vlm.start().ask(ASK, Options(max_tokens=1)).text == "ok"  # this fits


def test_a_budget_of_tokens_stops_before_sending(server, connect):
    vlm = connect(budget_tokens=40)
    for _ in range(2):
        vlm.start().ask(ASK, SHORT)  # 15 each
    with pytest.raises(BudgetExceeded, match="30 of 40 tokens"):
        vlm.start().ask([user("x" * 30)], SHORT)
    assert len(server.bodies) == 2


def test_concurrent_requests_do_not_overrun_a_budget(server, connect):
    server.default = say("ok", usage=(0, 5), seconds=0.02)
    vlm = connect(price_output=1e5, budget_cost=2.0, max_in_flight=8)
    turns = [vlm.start().submit(ASK, SHORT) for _ in range(8)]
    errors = [turn._future.exception() for turn in turns]
    assert sum(error is None for error in errors) == len(server.bodies) == 4
    assert all(error is None or isinstance(error, BudgetExceeded) for error in errors)


def test_a_request_waits_for_budget_that_others_hold_but_do_not_use(server, connect):
    server.script += [wait_for_gate("cheap")]
    server.default = say("ok", usage=(0, 1))
    vlm = connect(price_output=1e5, budget_cost=1.0)  # ten tokens
    options = Options(max_tokens=8)
    first = vlm.start().submit(ASK, options)
    until(lambda: server.bodies)
    second = vlm.start().submit(ASK, Options(max_tokens=5))
    third = vlm.start().submit(ASK, Options(max_tokens=5))
    time.sleep(0.05)
    assert len(server.bodies) == 1
    third.cancel()
    assert third.result(2.0).finish == "cancelled"
    server.gate.set()
    assert first.result(2.0).text == "cheap" and second.result(2.0).text == "ok"


def test_totals_are_a_snapshot(server, connect):
    server.default = say("ok", usage=(100, 4, 60))
    vlm = connect(price_input=1.0)
    before = vlm.totals()
    vlm.start().ask(ASK)
    after = vlm.totals()
    assert (before.replies, after.replies) == (0, 1)
    assert (after.prompt, after.prompt_cached, after.completion) == (100, 60, 4)
    assert (after.attempts, after.failed, after.cached, after.estimated) == (1, 0, 0, 0)
    assert after.cost == pytest.approx(1e-4)


def test_cancelling_a_stream_stops_it(server, connect):
    server.script += [gated_stream("one ", "more ")]
    vlm = connect(price_output=1e6)
    session = vlm.start()
    pieces = []
    pending = session.submit(ASK, on_text=pieces.append)
    until(lambda: pieces)
    pending.cancel()
    server.gate.set()
    reply = pending.result(5.0)
    assert reply.finish == "cancelled" and reply.text == "".join(pieces)
    assert reply.text.startswith("one ") and reply.attempts == 1
    assert reply.usage.completion == len(pieces)
    assert server.gone.wait(5), "the connection is still open"
    totals = vlm.totals()
    assert totals.estimated == 1 and totals.completion == len(pieces) and totals.cost > 0
    session.ask([user("go on")])
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": reply.text}


def test_cancelling_prevents_a_start(server, connect):
    server.script += [wait_for_gate("slow")]
    vlm = connect(max_in_flight=1)
    running = vlm.start().submit(ASK)
    until(lambda: server.bodies)
    session = vlm.start()
    waiting = session.submit([user("never")])
    done = []
    waiting.add_done_callback(done.append)
    waiting.cancel()
    assert waiting.result(0.0).finish == "cancelled" and waiting.result(0.0).attempts == 0
    assert done == [waiting]
    server.gate.set()
    running.result(5.0)
    session.ask([user("later")])
    assert [m["content"] for b in server.bodies for m in b["messages"]] == ["x", "later"]


@pytest.mark.parametrize("text", ["", "a red"])
def test_cancelling_prevents_a_retry(server, connect, text):
    server.script += [broken_stream(text, clean=False)] if text else [fail(500)]
    pending, pieces = None, []

    def pause(stop, seconds):
        pending.cancel()

    vlm = connect(pause=pause)
    session = vlm.start()
    session._workers = SlowStart(session._workers)
    pending = session.submit(ASK, on_text=pieces.append)
    session._workers.go()
    reply = pending.result(5.0)
    assert (reply.finish, reply.text, reply.attempts) == ("cancelled", text, 1)
    assert "".join(pieces) == text and len(server.bodies) == 1
    session._workers = session._workers._workers
    session.ask([user("y")])
    history = [m["content"] for m in server.bodies[1]["messages"]]
    assert history == (["x", text, "y"] if text else ["y"])


class SlowStart:
    """Workers that begin when told, so that a test knows its turn first."""

    def __init__(self, workers):
        self._workers, self.go = workers, None
        self.check_open = workers.check_open

    def start(self, turn):
        self.go = lambda: self._workers.start(turn)


def test_cancelling_ends_a_backoff(server, connect):
    server.default = fail(500)
    vlm = connect(pause=threading.Event.wait, first_delay=30.0)
    pending = vlm.start().submit(ASK)
    until(lambda: server.bodies)
    time.sleep(0.05)
    pending.cancel()
    assert pending.result(2.0).finish == "cancelled"


def test_a_timeout_of_waiting_does_not_end_the_turn(server, connect):
    server.script += [wait_for_gate("late")]
    pending = connect().start().submit(ASK)
    with pytest.raises(TimeoutError):
        pending.result(0.01)
    server.gate.set()
    assert pending.result(5.0).text == "late"


def test_callbacks_come_for_replies_and_errors(server, connect):
    done = threading.Event()
    server.default = fail(500)
    pending = connect(max_attempts=1).start().submit(ASK)
    pending.add_done_callback(lambda p: p is pending and done.set())
    assert done.wait(5)
    with pytest.raises(RemoteError):
        pending.result(0.0)


def test_closing_refuses_and_cancels(server, connect):
    server.script += [gated_stream("one ", "more ")]
    vlm = connect(max_in_flight=1)
    session = vlm.start()
    pieces = []
    running = session.submit(ASK, on_text=pieces.append)
    waiting = vlm.start().submit(ASK)
    until(lambda: pieces)
    server.gate.set()
    vlm.close()
    vlm.close()
    assert running.result(5.0).finish == waiting.result(5.0).finish == "cancelled"
    with pytest.raises(Overloaded, match="toy has been closed"):
        session.submit(ASK)
    with pytest.raises(Overloaded, match="toy has been closed"):
        vlm.start()
    until(lambda: vlm._endpoint._client.is_closed())
    assert len(server.bodies) == 1


def test_a_closed_session_is_cancelled_and_empty(server, connect):
    server.script += [wait_for_gate("slow")]
    vlm = connect(max_in_flight=1)
    running = vlm.start().submit(ASK)
    session = vlm.start()
    waiting = session.submit(ASK)
    session.close()
    assert waiting.result(1.0).finish == "cancelled"
    with pytest.raises(Overloaded, match="session has been closed"):
        session.submit(ASK)
    server.gate.set()
    assert running.result(5.0).text == "slow"
