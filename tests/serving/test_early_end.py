"""Requests that end before their reply: the work stops, the session closes, the server goes on."""

import json
import logging
import socket
import time

import openai
import pytest

from clvr_jax.serving.limits import Limits
from tests.serving.conftest import answer_on, eventually, serving, talk
from tests.serving.fake import FakeVlm

NAME = FakeVlm.name


@pytest.fixture
def one_at_a_time():
    with serving(Limits(max_queue=1)) as running:
        yield running


def idle(server):
    return server.health()["running"] == server.health()["waiting"] == 0


def assert_cancelled_and_closed(server):
    eventually(lambda: server.vlm.cancels == 1)
    eventually(lambda: not server.vlm.open)
    eventually(lambda: idle(server))
    assert server.say("next").json["choices"][0]["message"]["content"] == "you said: next"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_waiting(one_at_a_time, stream):
    connection = one_at_a_time.raw_say("hang", stream=stream)
    eventually(lambda: one_at_a_time.vlm.told)
    assert one_at_a_time.say("next").status == 429  # the one place is taken
    connection.close()
    assert_cancelled_and_closed(one_at_a_time)


def test_a_client_that_leaves_a_stream(one_at_a_time):
    connection = one_at_a_time.raw_say("slow 0.2", stream=True)
    while b"one" not in connection.recv(65536):
        pass
    connection.close()
    assert_cancelled_and_closed(one_at_a_time)


def test_openais_client_that_closes_a_stream(one_at_a_time):
    chat = one_at_a_time.client().chat.completions
    with chat.create(model=NAME, messages=talk("slow 0.2"), stream=True) as stream:
        next(iter(stream))
    assert_cancelled_and_closed(one_at_a_time)


def test_a_client_that_leaves_while_its_request_is_prepared(one_at_a_time):
    connection = one_at_a_time.raw_say("prepare-hang 0.3")
    eventually(lambda: one_at_a_time.vlm.told)
    connection.close()
    eventually(lambda: idle(one_at_a_time))
    assert one_at_a_time.vlm.open and not one_at_a_time.vlm.cancels  # the thread is still at it
    assert_cancelled_and_closed(one_at_a_time)


def test_a_client_that_leaves_in_the_middle_of_its_body(one_at_a_time):
    head = "Content-Type: application/json\r\nContent-Length: 1000"
    connection = one_at_a_time.raw(head, b'{"model"')
    eventually(lambda: one_at_a_time.health()["waiting"] == 1)
    connection.close()
    eventually(lambda: idle(one_at_a_time))
    assert one_at_a_time.say("next").status == 200 and not one_at_a_time.vlm.cancels


def test_all_choices_end_with_the_client_and_with_each_other(server):
    cancels = server.vlm.cancels
    body = {"model": NAME, "messages": talk("hang"), "n": 3}
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.3).chat.completions.create(**body)
    eventually(lambda: server.vlm.cancels == cancels + 3)
    eventually(lambda: idle(server))


@pytest.fixture(scope="module")
def impatient():
    with serving(Limits(timeout_s=0.3, kept_conversations=0)) as running:
        yield running


def test_a_reply_that_takes_too_long(impatient):
    cancels = impatient.vlm.cancels
    for stream in (False, True):
        answer = impatient.say("hang", stream=stream)
        assert answer.status == 504 and "0.3 s" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
    assert impatient.vlm.cancels == cancels + 2
    eventually(lambda: not impatient.vlm.open)
    assert impatient.say("x").status == 200


def test_a_request_that_takes_too_long_to_prepare(impatient):
    start = time.monotonic()
    assert impatient.say("prepare 0.8").status == 504
    assert time.monotonic() - start < 0.7
    eventually(lambda: not impatient.vlm.open)


def test_a_stream_that_takes_too_long_says_so_in_an_event(impatient):
    chat = impatient.client().chat.completions
    texts = []
    with pytest.raises(openai.APIError, match=r"no complete reply within 0\.3 s"):
        for chunk in chat.create(model=NAME, messages=talk("slow 0.12"), stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "one ", "two "]
    eventually(lambda: not impatient.vlm.open)


@pytest.fixture
def patient():
    """A busy machine takes longer than 0.3 s to read 10 MB before the stream begins."""
    with serving(Limits(timeout_s=2.0, kept_conversations=0)) as running:
        yield running


def test_a_client_that_does_not_read_its_stream_is_given_up(patient):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", patient.port))
        text = " ".join(["w" * 20_000] * 500)  # more than sockets buffer, in few pieces
        data = json.dumps({"model": NAME, "messages": talk(text), "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert not idle(patient)
        eventually(lambda: idle(patient), seconds=20.0)
        assert patient.say("x").status == 200
        received = answer_on(connection)
        assert len(received) < 500 * 20_000 and b"[DONE]" not in received


@pytest.mark.parametrize("command", ["break", "fail"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_is_logged_and_the_server_goes_on(server, caplog, command, stream):
    with caplog.at_level(logging.ERROR, "clvr_jax.serving"):
        answer = server.say(command, stream=stream)
    assert answer.status == 500 and answer.error["type"] == "server_error"
    number = answer.headers["x-request-id"]
    assert number in answer.error["message"] and "broke" not in answer.error["message"]
    (record,) = [r for r in caplog.records if r.name == "clvr_jax.serving"]
    assert number in record.getMessage() and "broke" in str(record.exc_info[1])
    assert server.say("x").status == 200


def test_a_stream_that_breaks_ends_with_its_error(server):
    chat = server.client().chat.completions
    texts = []
    with pytest.raises(openai.APIError, match="internal error"):
        for chunk in chat.create(model=NAME, messages=talk("then-fail"), stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "so far"]


def test_a_turn_that_the_backend_cancels_is_no_reply(server):
    for stream in (False, True):
        answer = server.say("stop-yourself", stream=stream)
        assert answer.status == 503 and answer.error["code"] == "cancelled"
