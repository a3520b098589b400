"""What OpenAI's client and ours send, and what they get."""

import base64
import io
import json

import openai
import pytest
from PIL import Image

from clvr_jax import __version__
from clvr_jax.backends.protocol import Options, system, user
from tests.serving.conftest import talk
from tests.serving.fake import FakeVlm

NAME = FakeVlm.name


@pytest.fixture(scope="module")
def chat(server):
    return server.client().chat.completions


def options_told(server) -> Options:
    return server.vlm.told[-1][2]


def test_a_reply_with_its_usage_and_times(chat):
    reply = chat.create(model=NAME, messages=talk("good morning"))
    choice = reply.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == "you said: good morning"
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert (reply.object, reply.model) == ("chat.completion", NAME)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 4)
    assert reply.usage.total_tokens == 6 and reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply.timings == {
        "queued_s": 0.1,
        "prefill_s": 0.2,
        "first_s": 0.3,
        "decode_s": 0.4,
        "constrain_s": 0.05,
        "total_s": 0.9,
    }
    assert choice.seed == 7  # the one that was drawn


def test_a_reply_ends_at_max_tokens(chat):
    for field in ("max_tokens", "max_completion_tokens"):
        reply = chat.create(model=NAME, messages=talk("a b c d"), **{field: 3})
        assert reply.choices[0].finish_reason == "length"
        assert reply.choices[0].message.content == "you said: a"


def test_a_stream_is_what_openai_sends(server):
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.say("a b", **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.raw.decode().split("\n\n")
    assert end == "data: [DONE]" and rest == ""
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert [delta["content"] for delta in deltas[1:-1]] == ["you", " said:", " a", " b"]
    finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert finishes == [None] * 5 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-2]["timings"]["first_s"] == 0.3


def test_the_client_joins_a_stream_and_gets_usage_only_on_request(chat):
    chunks = list(chat.create(model=NAME, messages=talk("slow 0.01"), stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "one two three four "


def test_pieces_are_sent_as_they_come(server, chat):
    stream = chat.create(model=NAME, messages=talk("slow 0.15"), stream=True)
    pieces = (chunk.choices[0].delta.content for chunk in stream)
    assert [next(pieces), next(pieces)] == ["", "one "]
    assert server.health()["running"] == 1
    assert "".join(piece or "" for piece in pieces) == "two three four "


def test_options_reach_the_model(server, chat):
    chat.create(
        model=NAME,
        messages=talk("x"),
        max_tokens=5,
        temperature=0.0,
        top_p=0.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        seed=-3,
        stop=["\n", "END"],
        logprobs=True,
        top_logprobs=2,
        user="me",
        store=False,
        metadata={"run": "1"},
        extra_body={"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.5},
    )
    assert options_told(server) == Options(
        max_tokens=5,
        temperature=0.0,
        top_k=40,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        seed=-3,
        stop=("\n", "END"),
        logprobs=2,
    )


def test_options_that_are_not_given_are_openais(server, chat):
    chat.create(model=NAME, messages=talk("x"), stop="END", extra_body={"top_k": -1})
    assert options_told(server) == Options(max_tokens=1024, temperature=1.0, stop=("END",))
    chat.create(model=NAME, messages=talk("x"), extra_body={"temperature": None, "seed": None})
    assert options_told(server) == Options(max_tokens=1024, temperature=1.0)


def test_forms_of_replies_reach_the_model(server, chat):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    chat.create(model=NAME, messages=talk("x"), response_format=wanted)
    assert options_told(server).schema == schema
    chat.create(model=NAME, messages=talk("x"), response_format={"type": "json_object"})
    assert options_told(server).schema == {"type": "object"}
    chat.create(model=NAME, messages=talk("x"), response_format={"type": "text"})
    assert options_told(server).schema is None
    grammar = 'start: "yes" | "no"'
    chat.create(model=NAME, messages=talk("x"), extra_body={"guided_grammar": grammar})
    assert options_told(server).grammar == grammar


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_reads_log_probabilities(chat, stream):
    wanted = dict(model=NAME, messages=talk("é"), logprobs=True, top_logprobs=2, stream=stream)
    got = chat.create(**wanted)
    content = [
        token
        for answer in (got if stream else [got])
        for token in (answer.choices[0].logprobs.content if answer.choices[0].logprobs else [])
    ]
    assert "".join(token.token for token in content) == "you said: é"
    assert content[-1].bytes == list(" é".encode()) and content[-1].logprob == -0.25
    rivals = [(rival.token, rival.bytes, rival.logprob) for rival in content[0].top_logprobs]
    # -9999 is what OpenAI sends for the impossible
    assert rivals == [(" x", [32, 120], -2.5), ("�", [0xF0, 0x9F], -9999.0)]


def test_several_choices_are_independent_sessions_with_seeds_of_their_own(server, chat):
    before = len(server.vlm.told)
    reply = chat.create(model=NAME, messages=talk("x y"), n=3, seed=10)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.seed for choice in reply.choices] == [10, 11, 12]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 12)
    told = server.vlm.told[before:]
    assert len({session for session, *_ in told}) == 3
    assert [options.seed for *_, options in told] == [10, 11, 12]


def test_roles_and_parts_reach_the_model_in_order(server, chat):
    picture = Image.new("RGB", (3, 2), "red")
    picture.putpixel((2, 1), (1, 2, 3))
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "text", "text": "look:"},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "text", "text": "what is it?"},
    ]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "user", "content": parts},
    ]
    chat.create(model=NAME, messages=messages)
    told = server.vlm.told[-1][1]
    assert told[:2] == (system("be brief"), user("hello"))
    before, image, after = told[2].parts
    assert (before, after) == ("look:", "what is it?")
    assert image.mode == "RGB" and image.tobytes() == picture.tobytes()


def test_a_reply_can_be_sent_back_as_the_client_dumps_it(chat):
    first = chat.create(model=NAME, messages=talk("x"))
    history = [*talk("x"), first.choices[0].message.model_dump(), *talk("y")]
    assert chat.create(model=NAME, messages=history).choices[0].message.content == "you said: y"


def test_models_and_health(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    model = client.models.retrieve(NAME)
    assert (model.id, model.max_model_len) == (NAME, 4096)
    with pytest.raises(openai.NotFoundError, match=NAME):
        client.models.retrieve("gpt-4o")
    state = server.health()
    assert (state["status"], state["model"], state["version"]) == ("ok", NAME, __version__)
    assert state["running"] == state["waiting"] == 0 and state["uptime_s"] >= 0
