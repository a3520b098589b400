"""Requests that are refused: the status, the field, and what to do about it."""

import json
import socket
import tracemalloc

import openai
import pytest

from clvr_jax.serving import wire
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.limits import Limits
from tests.serving.conftest import answer_on, serving, talk
from tests.serving.fake import FakeVlm

NAME = FakeVlm.name
GOOD = {"model": NAME, "messages": talk("x")}
PARTS = "messages[0].content"


def image(url):
    return [*talk("x", "y"), {"role": "user", "content": [{"type": "image_url", "image_url": url}]}]


@pytest.mark.parametrize(
    "fields,param,message",
    [
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"max_token": 1}, "max_token", "did you mean max_token"),
        ({"zzz": 1}, "zzz", "known: audio, frequency_penalty"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].contents", "mean content"),
        ({"messages": image({"url": "x", "detial": "low"})}, None, "did you mean detail"),
        ({"response_format": {"type": "text", "scheme": {}}}, "response_format.scheme", "known:"),
        ({"temperature": "hot"}, "temperature", "not 'hot'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, not -1"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "give one of them"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"n": 9}, "n", "at most 8"),
        ({"n": 2, "stream": True}, None, "cannot be streamed"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream=true"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
        ({"messages": [{"role": "user", "content": 5}]}, PARTS, "not 5"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, f"{PARTS}[0]", "text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            f"{PARTS}[0].type",
            "'text' or 'image_url', not 'input_audio'",
        ),
        (
            {"messages": [{"role": "system", "content": image("x")[2]["content"]}]},
            f"{PARTS}[0].image_url",
            "only user messages",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is given"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_grammar": "start: /a/"},
            None,
            "both schema and grammar",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"model": None}, "model", "valid string"),
        ({"messages": talk("too-long")}, None, "5000 tokens"),
        ({"messages": talk("late-refusal"), "stream": True}, None, "the schema is broken"),
        ({"messages": talk("late-refusal")}, None, "the schema is broken"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_wrong_fields_are_named(server, fields, param, message):
    answer = server.post(GOOD | fields)
    assert answer.status == 400, answer.raw
    assert answer.error["type"] == "invalid_request_error"
    assert message in answer.error["message"]
    if param is not None:
        assert answer.error["param"] == param and param in answer.error["message"]


def test_a_conversation_that_is_too_long_has_the_code_that_clients_know(server):
    answer = server.post(GOOD | {"messages": talk("too-long")})
    assert answer.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body,message",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"model": NaN}', "model"),
        (b"\xff\xfe", "no JSON"),
        (b'{"model": "\\ud800"}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "the body: "),
        (b"{}", "model is missing (and 1 more)"),
    ],
)
def test_bodies_that_are_no_request(server, body, message):
    answer = server.post(body)
    assert answer.status == 400 and message in answer.error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"x","messages":[' + b",".join([b"5"] * 200_000) + b"]}",
        b'{"model":"x","messages":[{"role":"user","content":['
        + b",".join([b"5"] * 200_000)
        + b"]}]}",
        b"{" + b",".join(b'"a%d":1' % i for i in range(200_000)) + b"}",
        b'{"stop":[' + b",".join([b"5"] * 200_000) + b"]}",
        json.dumps({"x" * 1_000_000: 1}).encode(),
    ],
    ids=["messages", "parts", "fields", "stops", "name"],
)
def test_a_body_of_many_mistakes_costs_no_more_than_one(body):
    wire.parse(json.dumps(GOOD).encode())
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            wire.parse(body)
        assert len(str(caught.value)) < 2000
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_a_body_must_say_that_it_is_plain_json(server):
    data = json.dumps(GOOD).encode()
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        answer = server.post(data, **headers)
        assert answer.status == 415 and next(iter(headers)) in answer.error["message"]
    assert server.request("POST", "/v1/chat/completions", data).status == 415
    assert server.post(data, **{"content-type": "Application/JSON; charset=utf-8"}).status == 200


def test_paths_methods_and_models_that_are_not_there(server):
    for path in ("/", "/v1/embeddings", "/v1/models/", "/v1/chat/completions/"):
        answer = server.request("GET", path)
        assert answer.status == 404 and answer.error["message"]
    answer = server.request("GET", "/v1/chat/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert "use POST" in answer.error["message"]
    assert server.request("DELETE", "/health", b"{}").status == 405
    answer = server.post(GOOD | {"model": "gpt-4o"})
    assert answer.status == 404 and NAME in answer.error["message"]
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")


def test_a_backend_without_room_asks_to_try_again(server):
    for stream in (False, True):
        answer = server.say("overloaded", stream=stream)
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert answer.error["type"] == "rate_limit_error"


def test_the_client_raises_its_own_errors(server):
    chat = server.client().chat.completions
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create(model=NAME, messages=talk("x"), extra_body={"topk": 3})
    assert caught.value.param == "topk" and "top_k" in str(caught.value)
    with pytest.raises(openai.RateLimitError):
        chat.create(model=NAME, messages=talk("overloaded"))


def test_a_client_with_a_key_comes_in_and_no_other():
    with serving(api_key="geheim-ü") as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer "},
            {"authorization": "Basic geheim-ü".encode()},
        ):
            for path in ("/v1/models", "/nowhere"):
                answer = server.request("GET", path, headers=headers)
                assert answer.status == 401, headers
                assert answer.error["code"] == "invalid_api_key"
            answer = server.post(GOOD, **headers)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        assert not server.vlm.told
        key = {"authorization": "bearer geheim-ü".encode()}
        assert server.post(GOOD, **key).status == 200
        assert server.health()["status"] == "ok"


def test_an_empty_key_is_no_key():
    with pytest.raises(ValueError, match="key is empty"), serving(api_key=""):
        pass


def test_limits_must_make_sense():
    with pytest.raises(ValueError, match="max_queue is 0; it must be at least 1"):
        Limits(max_queue=0)
    with pytest.raises(ValueError, match=r"timeout_s is 0\.0; it must be above 0"):
        Limits(timeout_s=0.0)
    assert Limits(kept_conversations=0, timeout_s=0.5).max_images == 16


@pytest.fixture(scope="module")
def narrow():
    limits = Limits(max_body_bytes=200_000, body_timeout_s=0.3)
    with serving(limits) as running:
        yield running


def test_a_large_body_is_refused_and_its_sender_hears_of_it(narrow):
    answer = narrow.post(b"x" * 30_000_000)  # far more than sockets buffer
    assert answer.status == 413 and "200000 bytes" in answer.error["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        narrow.client().chat.completions.create(model=NAME, messages=talk("x" * 300_000))
    assert caught.value.status_code == 413
    assert narrow.say("x" * 150_000).status == 200


def test_a_declared_size_alone_is_refused(narrow):
    head = "Content-Type: application/json\r\nContent-Length: 99999999999"
    received = answer_on(narrow.raw(head))
    assert received.startswith(b"HTTP/1.1 413") and b"200000 bytes" in received


def test_a_chunked_body_is_counted_as_it_arrives(narrow):
    chunk = b"%x\r\n%s\r\n" % (150_000, b" " * 150_000)
    head = "Content-Type: application/json\r\nTransfer-Encoding: chunked"
    assert answer_on(narrow.raw(head, chunk * 2)).startswith(b"HTTP/1.1 413")
    good = json.dumps(GOOD).encode()
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good)
    received = answer_on(narrow.raw(head + "\r\nConnection: close", body))
    assert received.startswith(b"HTTP/1.1 200") and b"you said: x" in received


def test_a_body_shorter_than_declared_is_not_waited_for_long(narrow):
    head = "Content-Type: application/json\r\nContent-Length: 1000"
    received = answer_on(narrow.raw(head, b'{"model"'))
    assert received.startswith(b"HTTP/1.1 408") and b"did not arrive" in received


def test_a_body_longer_than_declared_does_no_harm(narrow):
    good = json.dumps(GOOD).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(good)}"
    received = answer_on(narrow.raw(head, good + b"junk after the end\r\n\r\n"))
    assert received.startswith(b"HTTP/1.1 200")
    assert narrow.say("x").status == 200


def test_no_http_at_all_does_no_harm(narrow):
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert narrow.say("x").status == 200
