"""Endpoints that fail: how often, when and for how long they are asked again."""

import json
import logging
import time

import pytest

from clvr_jax.backends.protocol import InvalidRequest, TooLong, user
from clvr_jax.backends.remote import RemoteError
from clvr_jax.backends.remote.retry import retry_after
from tests.backends.remote.chat_server import (
    answer_with,
    begin_stream,
    broken_stream,
    chunk,
    completion,
    drop,
    fail,
    hang,
    say,
    usage_of,
)
from tests.backends.remote.conftest import KEY

ASK = [user("x")]


def test_delays_double_and_are_jittered(server, connect):
    server.script += [fail(500), fail(503), fail(408), fail(409)]
    draws = iter([1.0, 0.0, 0.5, 1.0])
    vlm = connect(draw=lambda: next(draws), first_delay=1.0, max_delay=5.0)
    reply = vlm.start().ask(ASK)
    assert reply.text == "ok" and reply.attempts == 5 and len(server.bodies) == 5
    assert vlm.delays == [1.0, 1.0, 3.0, 5.0]  # 1, 2/2, 4*3/4, and 8 cut to 5
    totals = vlm.totals()
    assert (totals.attempts, totals.replies, totals.failed) == (5, 1, 0)


@pytest.mark.parametrize(
    "headers, delay",
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "2500"}, 2.5),
        ({"retry-after": "0"}, 0.5),
        ({"retry-after": "soon"}, 0.5),
    ],
)
def test_retry_after_is_honoured(server, connect, headers, delay):
    server.script += [fail(429, headers=headers)]
    vlm = connect()
    assert vlm.start().ask(ASK).attempts == 2
    assert vlm.delays == [delay]


def test_retry_after_may_be_a_date():
    headers = {"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}
    assert retry_after(headers, now=70.0) == 30.0
    assert retry_after(headers, now=200.0) == 0.0


def test_tries_are_bounded(server, connect):
    server.default = fail(500, "out of order")
    vlm = connect(max_attempts=3)
    with pytest.raises(
        RemoteError, match=r"3 tries.*max_attempts is 3.*HTTP 500: out of order"
    ) as e:
        vlm.start().ask(ASK)
    assert len(server.bodies) == 3 and (e.value.attempts, e.value.status) == (3, 500)
    assert len(vlm.delays) == 2 and vlm.totals().failed == 1


def test_time_is_bounded(server, connect):
    server.default = fail(429, "later", {"retry-after": "100"})
    vlm = connect(total_timeout=60.0)
    with pytest.raises(RemoteError, match="total_timeout is 60"):
        vlm.start().ask(ASK)
    assert len(server.bodies) == 1 and vlm.delays == []


def test_an_endless_stream_is_bounded(server, connect):
    def trickle(handler, body, server):
        begin_stream(handler)
        while not server.closing.wait(0.02):
            chunk(handler, "more ")

    server.default = trickle
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="still streaming"):
        connect(total_timeout=0.3).start().ask(ASK, on_text=lambda _: None)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_refused_requests_are_not_repeated(server, connect, status):
    server.default = fail(status, "context of 4096 tokens exceeded")
    vlm = connect()
    with pytest.raises(InvalidRequest, match=f"HTTP {status}: context of 4096 tokens exceeded"):
        vlm.start().ask(ASK)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "message, code",
    [
        ("This model's maximum context length is 4096 tokens. However, you requested 5000", None),
        ("5000 tokens are longer than the model's context length (4096 tokens)", None),
        ("shorten it", "context_length_exceeded"),
    ],
)
def test_a_conversation_that_fills_the_context_is_told_from_other_refusals(
    server, connect, message, code
):
    server.default = fail(400, message, code=code)
    with pytest.raises(TooLong):
        connect().start().ask(ASK)
    server.default = fail(400, "temperature: not supported in this context")
    with pytest.raises(InvalidRequest) as caught:
        connect().start().ask(ASK)
    assert type(caught.value) is InvalidRequest


def test_an_empty_account_is_not_asked_again(server, connect):
    server.default = fail(429, "no money", code="insufficient_quota")
    with pytest.raises(RemoteError, match="no money"):
        connect().start().ask(ASK)
    assert len(server.bodies) == 1


def test_a_hanging_endpoint_times_out(server, connect):
    server.script += [hang]
    begin = time.monotonic()
    reply = connect(timeout=0.2).start().ask(ASK)
    assert reply.attempts == 2 and 0.2 <= time.monotonic() - begin < 3


def test_nobody_listens(connect):
    vlm = connect(base_url="http://127.0.0.1:9/v1", max_attempts=2)
    with pytest.raises(RemoteError, match=r"2 tries.*connection failed") as caught:
        vlm.start().ask(ASK)
    assert caught.value.status is None


no_choices = json.dumps(completion("chat.completion", [], usage_of(10, 5))).encode()
no_message = json.dumps(completion("chat.completion", [{"index": 0}], None)).encode()


@pytest.mark.parametrize(
    "step",
    [
        drop,
        answer_with(b'{"choices": [{"mess'),
        answer_with(b"<html>busy</html>", "text/html"),
        answer_with(b"[]"),
        answer_with(b"{}"),
        answer_with(no_choices),
        answer_with(no_message),
        say("half", finish="abort"),
    ],
)
def test_unusable_answers_are_asked_for_again(server, connect, step):
    server.script += [step]
    reply = connect().start().ask(ASK)
    assert (reply.text, reply.attempts) == ("ok", 2)


def test_what_an_unusable_answer_billed_is_counted(server, connect):
    server.script += [answer_with(no_choices)]
    vlm = connect(price_input=1e6, price_output=2e6)
    reply = vlm.start().ask(ASK)
    assert reply.usage.cost == 20.0 and vlm.totals().cost == 40.0
    assert (vlm.totals().prompt, vlm.totals().completion) == (20, 10)


@pytest.mark.parametrize(
    "broken",
    [
        broken_stream("a red", clean=False),
        broken_stream("a red", clean=True),
        broken_stream("a red", clean=True, last=b"data: {nonsense\n\n"),
        broken_stream("a red", clean=True, last=b'data: {"error": {"message": "oops"}}\n\n'),
        fail(500),
    ],
)
def test_a_stream_that_breaks_goes_on_where_it_stopped(server, connect, broken):
    server.script += [broken, say("a red square")]
    pieces = []
    reply = connect().start().ask(ASK, on_text=pieces.append)
    assert "".join(pieces) == reply.text == "a red square"
    assert reply.attempts == 2


@pytest.mark.parametrize("second", ["a blue square", "a r"])
def test_a_stream_that_goes_on_otherwise_fails(server, connect, second):
    server.script += [broken_stream("a red", clean=False), say(second)]
    pieces, vlm = [], connect()
    with pytest.raises(RemoteError, match="broke after 5 characters"):
        vlm.start().ask(ASK, on_text=pieces.append)
    assert "".join(pieces) == "a red" and len(server.bodies) == 2
    assert vlm.totals().completion > 2 and vlm.totals().failed == 1  # both streams are billed


def test_a_stream_that_breaks_after_its_finish_is_whole(server, connect):
    def step(handler, body, server):
        begin_stream(handler)
        chunk(handler, "all")
        chunk(handler, None, "stop")

    server.script += [step]
    reply = connect().start().ask(ASK, on_text=lambda _: None)
    assert (reply.text, reply.attempts) == ("all", 1)


def test_an_error_in_a_stream_may_refuse(server, connect):
    error = b'data: {"error": {"message": "too long", "code": 400}}\n\n'
    server.default = broken_stream("a", clean=True, last=error)
    with pytest.raises(InvalidRequest, match="too long"):
        connect().start().ask(ASK, on_text=lambda _: None)
    assert len(server.bodies) == 1


def test_the_key_appears_nowhere(server, connect, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server.script += [
        fail(500, f"your key {KEY} is fine, we are not"),
        say("hello"),
        fail(401, f"Incorrect API key provided: {KEY}"),
    ]
    vlm = connect(cache=tmp_path / "cache", transcript=tmp_path / "t.jsonl")
    vlm.start().ask(ASK)
    with pytest.raises(InvalidRequest) as caught:
        vlm.start().ask([user("y")])
    assert "<key>" in str(caught.value) and "<key>" in caplog.text
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) == 2
    kept = [f.read_text() for f in files] + [caplog.text, str(caught.value), repr(vlm._config)]
    assert not any(KEY in text for text in kept)
