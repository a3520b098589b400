"""What is sent, what is made of the answer, and what the session keeps."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clvr_jax.backends.protocol import (
    Closed,
    InvalidRequest,
    Message,
    Options,
    Overloaded,
    assistant,
    system,
    user,
)
from clvr_jax.backends.remote import RemoteConfig
from tests.backends.remote.chat_server import fail, say, wait_for_gate
from tests.backends.remote.conftest import KEY


def noise(seed, size=(7, 5), mode="RGB"):
    channels = len(mode) if mode != "P" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if mode != "P" else "L")


def sent_pictures(body):
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    return [
        (u[: u.index(",")], Image.open(io.BytesIO(base64.b64decode(u.split(",")[1])))) for u in urls
    ]


def test_a_turn(server, connect):
    server.default = say("a red square", usage=(100, 4, 60))
    vlm = connect(price_input=2.0, price_cached_input=0.5, price_output=10.0, context=4096)
    reply = vlm.start().ask([system("be brief"), user("what is ", "this?")])
    assert (reply.text, reply.finish, reply.attempts) == ("a red square", "stop", 1)
    assert (reply.usage.prompt, reply.usage.cached, reply.usage.completion) == (100, 60, 4)
    assert reply.usage.cost == pytest.approx((40 * 2 + 60 * 0.5 + 4 * 10) / 1e6)
    assert 0 <= reply.times.queued <= reply.times.first <= reply.times.total < 5
    (body,) = server.bodies
    assert body["model"] == "toy" and "stream" not in body
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is this?"},
    ]
    path, headers = server.headers[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (vlm.name, vlm.context) == ("toy", 4096)


def test_temperature_and_the_other_options_are_always_explicit(server, connect):
    vlm = connect()
    vlm.start().ask([user("x")])
    body = server.bodies[-1]
    assert body["temperature"] == 0 and body["top_p"] == 1 and body["max_tokens"] == 1024
    assert body["presence_penalty"] == 0 and body["frequency_penalty"] == 0
    absent = {"seed", "stop", "top_k", "min_p", "repetition_penalty", "response_format", "logprobs"}
    assert not absent & body.keys()
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    options = Options(
        max_tokens=7,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1.5,
        frequency_penalty=-1.0,
        seed=3,
        stop=("END",),
        schema=schema,
    )
    vlm.start().ask([user("x")], options)
    body = server.bodies[-1]
    expected = {
        "max_tokens": 7,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.0,
        "seed": 3,
        "stop": ["END"],
    }
    assert {name: body[name] for name in expected} == expected
    assert body["response_format"]["type"] == "json_schema"
    sent = body["response_format"]["json_schema"]
    assert sent["strict"] is True and sent["schema"] == schema
    assert list(sent["schema"]["properties"]) == ["b", "a"]


def test_the_config_adds_to_the_body(server, connect):
    vlm = connect(
        max_tokens_field="max_completion_tokens",
        sampling_extensions=True,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    vlm.start().ask([user("x")], Options(max_tokens=9))
    body = server.bodies[-1]
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0, 1)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_pictures_arrive_in_order_and_exact(server, connect):
    first, second = noise(0), noise(1, (3, 9), "RGBA")
    palette = noise(2).quantize(8)
    vlm = connect()
    vlm.start().ask([user("one", first, "two", second, palette)])
    content = server.bodies[0]["messages"][0]["content"]
    assert [p["type"] for p in content] == ["text", "image_url", "text", "image_url", "image_url"]
    assert [p["text"] for p in content if p["type"] == "text"] == ["one", "two"]
    kinds, pictures = zip(*sent_pictures(server.bodies[0]))
    assert set(kinds) == {"data:image/png;base64"}
    for got, expected in zip(pictures, (first, second, palette.convert("RGB"))):
        assert got.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_jpeg_is_sent_where_the_config_wants_it(server, connect):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    connect(jpeg_quality=90).start().ask([user(clear)])
    ((kind, picture),) = sent_pictures(server.bodies[0])
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG"
    assert np.asarray(picture).min() > 250  # transparent is white


def test_a_picture_that_changes_later_is_sent_as_it_was(server, connect):
    server.script += [say("one"), say("two")]
    session = connect().start()
    image = Image.new("RGB", (4, 4), "red")
    session.ask([user(image)])
    image.paste("blue", (0, 0, 4, 4))
    session.ask([user("again")])
    assert sent_pictures(server.bodies[1])[0][1].getpixel((0, 0)) == (255, 0, 0)


def test_every_turn_sends_the_history(server, connect):
    server.script += [say("one"), say("two")]
    session = connect().start()
    session.ask([system("s"), user("a", noise(0))])
    session.ask([assistant("said elsewhere"), user("b")])
    session.ask([user("c")])
    assert server.bodies[2]["messages"][:2] == server.bodies[0]["messages"]
    rest = [(m["role"], m["content"]) for m in server.bodies[2]["messages"][2:]]
    assert rest == [
        ("assistant", "one"),
        ("assistant", "said elsewhere"),
        ("user", "b"),
        ("assistant", "two"),
        ("user", "c"),
    ]


def test_a_failed_turn_leaves_the_session_as_it_was(server, connect):
    session = connect().start()
    session.ask([user("a")])
    server.script += [fail(400, "too long")]
    with pytest.raises(InvalidRequest, match="too long"):
        session.ask([user("bad")])
    session.ask([user("b")])
    assert [m["content"] for m in server.bodies[2]["messages"]] == ["a", "ok", "b"]


def test_a_turn_taken_back_has_never_been(server, connect):
    session = connect().start()
    with pytest.raises(InvalidRequest, match="no turn to take back"):
        session.take_back()
    session.ask([user("a")])
    session.ask([user("lost")])
    session.take_back()
    with pytest.raises(InvalidRequest, match="no turn to take back"):
        session.take_back()
    session.ask([user("b")])
    assert [m["content"] for m in server.bodies[2]["messages"]] == ["a", "ok", "b"]
    session.close()
    with pytest.raises(Closed):
        session.take_back()


@pytest.mark.parametrize("stream", [False, True])
def test_length_is_told(server, connect, stream):
    server.default = say("and so", finish="length")
    pieces = []
    reply = connect().start().ask([user("x")], on_text=pieces.append if stream else None)
    assert (reply.text, reply.finish) == ("and so", "length")


def test_streaming_passes_pieces_on(server, connect):
    server.default = say("a red square", usage=(7, 3))
    pieces = []
    reply = connect().start().ask([user("x")], on_text=pieces.append)
    assert pieces == ["a ", "red ", "square"]
    assert (reply.text, reply.finish) == ("a red square", "stop")
    assert (reply.usage.prompt, reply.usage.completion) == (7, 3)
    body = server.bodies[0]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert reply.times.queued <= reply.times.first <= reply.times.total
    assert reply.times.prefill > 0 and reply.times.decode > 0


@pytest.mark.parametrize("stream", [False, True])
def test_usage_is_estimated_where_the_endpoint_tells_none(server, connect, stream):
    server.default = say("six words that nobody has counted", usage=None)
    vlm = connect(price_output=1.0)
    reply = vlm.start().ask([user("x" * 300)], on_text=(lambda _: None) if stream else None)
    assert 75 <= reply.usage.prompt <= 150 and 4 <= reply.usage.completion <= 10
    assert reply.usage.cost > 0 and vlm.totals().estimated == 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server, connect, stream):
    euro = list("€".encode())
    server.default = say(
        "€",
        logprobs=[
            {
                "token": "\\xe2",
                "bytes": euro[:2],
                "logprob": -0.5,
                "top_logprobs": [{"token": "y", "bytes": None, "logprob": -0.25}],
            },
            {"token": "c", "bytes": [99], "logprob": -1.0, "top_logprobs": []},
        ],
    )
    on_text = (lambda _: None) if stream else None
    reply = connect().start().ask([user("x")], Options(logprobs=3), on_text)
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 3
    first, second = reply.tokens
    assert (first.text, first.raw, first.logprob) == ("\ufffd", bytes(euro[:2]), -0.5)
    assert first.rivals == (("y", b"y", -0.25),)
    assert (second.text, second.raw, second.rivals) == ("c", b"c", ())


def test_missing_logprobs_are_an_error(server, connect):
    vlm = connect()
    with pytest.raises(InvalidRequest, match="gave no log-probabilities"):
        vlm.start().ask([user("x")], Options(logprobs=0))
    assert vlm.totals().prompt == 10


@pytest.mark.parametrize(
    "step", [say("", refusal="I will not", content=None), say("so", finish="content_filter")]
)
def test_a_refusal_is_an_error_and_is_billed(server, connect, step):
    server.default = step
    vlm = connect(price_input=1.0)
    with pytest.raises(InvalidRequest, match="refused to answer"):
        vlm.start().ask([user("x")])
    assert vlm.totals().prompt == 10 and vlm.totals().cost > 0 and vlm.totals().failed == 1


@pytest.mark.parametrize(
    "messages, options, message",
    [
        ([], Options(), "cannot continue"),
        ([user("x")], Options(grammar="start: /a/"), "Lark grammar"),
        ([user("x")], Options(schema={"x": object()}), "JSON"),
        ([user("\ud800")], Options(), "JSON"),
        ([user()], Options(), "without parts"),
        ([Message("assistant", (Image.new("RGB", (1, 1)),))], Options(), "only users"),
        ([user(Image.new("I;16", (4, 4)))], Options(), "8 bits"),
        ([user(Image.new("RGB", (0, 4)))], Options(), "at least one pixel"),
    ],
)
def test_what_cannot_be_answered_is_not_sent(server, connect, messages, options, message):
    session = connect().start()
    with pytest.raises(InvalidRequest, match=message):
        session.submit(messages, options)
    assert not server.bodies
    assert session.ask([user("fine")]).text == "ok"


def test_an_unreadable_picture_is_refused(server, connect):
    file = io.BytesIO()
    noise(0, (64, 64)).save(file, format="PNG")
    cut = Image.open(io.BytesIO(file.getvalue()[:2000]))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        connect().start().submit([user(cut)])


def test_scores_are_refused(connect):
    with pytest.raises(InvalidRequest, match="log-probabilities of given text"):
        connect().start().score([user("x")], ["a"])


def test_one_turn_at_a_time(server, connect):
    server.script += [wait_for_gate("slow")]
    session = connect().start()
    pending = session.submit([user("a")])
    with pytest.raises(Overloaded, match="still being generated"):
        session.submit([user("b")])
    server.gate.set()
    assert pending.result().text == "slow"
    session.ask([user("c")])
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["a", "slow", "c"]


def test_an_error_of_on_text_is_the_callers(server, connect):
    session = connect().start()
    with pytest.raises(ZeroDivisionError):
        session.ask([user("x")], on_text=lambda _: 1 / 0)
    assert session.ask([user("y")]).text == "ok"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base_url": "localhost:8000"}, "expected http"),
        ({"base_url": "http://me:pw@host/v1"}, "key_env"),
        ({"base_url": "http://host/v1?key=pw"}, "key_env"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"max_in_flight": 0}, "max_in_flight is 0"),
        ({"tokens_per_minute": -1.0}, "tokens_per_minute"),
        ({"price_input": -1.0}, "price_input"),
        ({"budget_cost": 1.0}, "prices are 0"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"extra_body": {"temperature": 1}}, "extra_body sets temperature"),
        ({"key_env": "CLVR_ABSENT_KEY"}, "export CLVR_ABSENT_KEY="),
    ],
)
def test_a_config_is_checked(monkeypatch, fields, message):
    monkeypatch.delenv("CLVR_ABSENT_KEY", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        RemoteConfig("toy", **{"key_env": None, **fields})
    assert "pw" not in str(caught.value)


def test_an_endpoint_without_key_gets_none(server, connect):
    connect(key_env=None).start().ask([user("x")])
    assert server.headers[0][1]["Authorization"] == "Bearer none"
