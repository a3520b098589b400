"""Exchanges that are written down, and replayed."""

import datetime
import json
import threading

import numpy as np
import pytest
from PIL import Image

from clvr_jax.backends.protocol import InvalidRequest, Options, assistant, system, user
from clvr_jax.backends.remote import NotRecorded, Replay
from tests.backends.remote.chat_server import fail, gated_stream, say

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
PROMPT = "Look at the picture and tell whether the square is red, please; answer yes or no."


@pytest.fixture
def transcript(server, connect, tmp_path):
    """Two turns of a conversation, and the same picture once more."""
    server.script += [fail(500), say("yes", usage=(50, 1)), say("no")]
    vlm = connect(transcript=tmp_path / "logs" / "run.jsonl", price_input=1.0)
    session = vlm.start()
    session.ask([system("judge"), user(PROMPT, RED)], Options(seed=5))
    session.ask([user("and now?", BLUE, RED)])
    return tmp_path / "logs" / "run.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_exchange_is_written_down(server, transcript):
    first, second = lines_of(transcript)
    assert first["request"]["endpoint"]["model"] == "toy"
    assert first["request"]["endpoint"]["base_url"] == server.url
    assert first["request"]["options"]["seed"] == 5
    assert [m["role"] for m in second["request"]["messages"]] == [
        *("system", "user", "assistant", "user")
    ]
    assert first["request"]["messages"][1]["parts"][0] == {"text": PROMPT}
    assert (first["reply"]["text"], first["reply"]["attempts"]) == ("yes", 2)
    assert first["reply"]["usage"] == {
        "prompt": 50,
        "cached": 0,
        "completion": 1,
        "cost": pytest.approx(5e-5),
    }
    assert 0 < first["seconds"] < 5
    ended = datetime.datetime.fromisoformat(first["time"])
    assert abs(datetime.datetime.now(datetime.UTC) - ended).total_seconds() < 60


def test_pictures_lie_beside_it_once(transcript):
    files = {f.stem: np.asarray(Image.open(f)) for f in transcript.with_suffix(".images").iterdir()}
    parts = lines_of(transcript)[1]["request"]["messages"][3]["parts"]
    assert len(files) == 2
    np.testing.assert_array_equal(files[parts[1]["image"]], np.asarray(BLUE))
    np.testing.assert_array_equal(files[parts[2]["image"]], np.asarray(RED))


def test_a_transcript_is_replayed_without_key_and_network(server, transcript, monkeypatch):
    server.bodies.clear()
    monkeypatch.delenv("CLVR_TEST_KEY")
    vlm = Replay(transcript)
    session = vlm.start()
    pieces = []
    reply = session.ask([system("judge"), user(PROMPT, RED)], Options(seed=5), pieces.append)
    assert (reply.text, "".join(pieces), reply.seed) == ("yes", "yes", 5)
    assert (reply.usage.prompt, reply.usage.cost, reply.attempts) == (50, 0.0, 0)
    assert session.ask([user("and now?", BLUE, RED)]).text == "no"
    assert vlm.name == "toy" and not server.bodies
    vlm.close()


def test_cached_replies_are_written_down_too(server, connect, tmp_path):
    vlm = connect(cache=tmp_path / "c", transcript=tmp_path / "t.jsonl")
    for _ in range(2):
        vlm.start().ask([user("x")])
    assert [line["reply"]["attempts"] for line in lines_of(tmp_path / "t.jsonl")] == [1, 0]


def test_samples_are_replayed_in_order(server, connect, tmp_path):
    server.script += [say("one"), say("two")]
    vlm = connect(transcript=tmp_path / "t.jsonl")
    sampled = Options(temperature=1.0)
    for _ in range(2):
        vlm.start().ask([user("x")], sampled)
    replay = Replay(tmp_path / "t.jsonl")
    texts = [replay.start().ask([user("x")], sampled).text for _ in range(3)]
    assert texts == ["one", "two", "two"]


def test_jpeg_transcripts_are_replayed(server, connect, tmp_path):
    connect(transcript=tmp_path / "t.jsonl", jpeg_quality=80).start().ask([user(RED)])
    assert Replay(tmp_path / "t.jsonl").start().ask([user(RED)]).text == "ok"


@pytest.mark.parametrize(
    "messages, options, difference",
    [
        (
            [system("judge"), user(PROMPT.replace("red", "blue"), RED)],
            Options(seed=5),
            r"message 1 \(user\), part 0 differs: from character 51, "
            r"asked '.*is blue, .*', recorded '.*is red, .*'",
        ),
        (
            [system("judge"), user(PROMPT, BLUE)],
            Options(seed=5),
            r"message 1 \(user\), part 1 differs: asked image \w{12} of 8 x 6, recorded image",
        ),
        (
            [system("judge"), user(PROMPT, "red")],
            Options(seed=5),
            r"part 1 differs: asked text 'red', recorded image",
        ),
        ([system("judge"), user(PROMPT)], Options(seed=5), r"has 1 parts, recorded 2"),
        ([user("judge")], Options(seed=5), r"message 0 is asked as user, recorded as system"),
        ([system("judge")], Options(seed=5), r"2 messages, .*but 1 messages are asked"),
        (
            [system("judge"), user(PROMPT, RED)],
            Options(seed=6, max_tokens=9),
            r"options differ: max_tokens is 9, recorded 1024; seed is 6, recorded 5",
        ),
        (
            [
                *(system("judge"), user(PROMPT, RED), assistant("yes")),
                user("and then?", BLUE, RED),
            ],
            Options(),
            r"4 messages, message 3 \(user\), part 0 .*'and then\?', recorded 'and now\?'",
        ),
    ],
)
def test_what_is_not_recorded_is_explained(transcript, messages, options, difference):
    session = Replay(transcript).start()
    with pytest.raises(NotRecorded, match=difference):
        session.ask(messages, options)
    assert session.ask([system("judge"), user(PROMPT, RED)], Options(seed=5)).text == "yes"


def test_damaged_lines_are_left_out(server, connect, transcript, caplog):
    lines = transcript.read_text().splitlines()
    lines[0] = lines[0].replace("judge", "fudge")
    transcript.write_text("\n".join(lines) + '\n{"key": "cut of')
    server.script += [say("after")]
    connect(transcript=transcript).start().ask([user("x")])
    replay = Replay(transcript)
    assert "line 1 is damaged" in caplog.text and "line 3 is damaged" in caplog.text
    assert replay.start().ask([user("x")]).text == "after"
    with pytest.raises(NotRecorded):
        replay.start().ask([system("judge"), user(PROMPT, RED)], Options(seed=5))


def test_one_endpoint_is_replayed(server, connect, transcript):
    connect(transcript=transcript, base_url=f"{server.url}/other/..").start().ask([user("x")])
    with pytest.raises(ValueError, match=r"exactly one endpoint.*/other/\.\."):
        Replay(transcript)
    replay = Replay(transcript, base_url=server.url + "/")
    assert replay.start().ask([system("judge"), user(PROMPT, RED)], Options(seed=5)).text == "yes"
    with pytest.raises(ValueError, match="found: none"):
        Replay(transcript, model="other")
    with pytest.raises(FileNotFoundError):
        Replay(transcript.with_name("absent"))


def test_cancelled_turns_are_written_but_not_replayed(server, connect, tmp_path):
    server.script += [gated_stream("one ", "more ")]
    server.gate.set()
    vlm = connect(transcript=tmp_path / "t.jsonl")
    begun = threading.Event()
    pending = vlm.start().submit([user("x")], on_text=lambda _: begun.set())
    assert begun.wait(5)
    pending.cancel()
    assert pending.result(5.0).finish == "cancelled"
    vlm.start().ask([user("x")])
    assert [x["reply"]["finish"] for x in lines_of(tmp_path / "t.jsonl")] == ["cancelled", "stop"]
    assert Replay(tmp_path / "t.jsonl").start().ask([user("x")]).text == "ok"


def test_many_threads_write_whole_lines(server, connect, tmp_path):
    models = [connect(transcript=tmp_path / "t.jsonl") for _ in range(2)]
    turns = [m.start().submit([user(f"{i} ä", RED)]) for i in range(15) for m in models]
    assert all(turn.result().text == "ok" for turn in turns)
    texts = [
        x["request"]["messages"][0]["parts"][0]["text"] for x in lines_of(tmp_path / "t.jsonl")
    ]
    assert sorted(texts) == sorted([f"{i} ä" for i in range(15)] * 2)


def test_a_transcript_that_cannot_be_written_fails_the_turn(server, connect, tmp_path):
    (tmp_path / "file").write_text("")
    session = connect(transcript=tmp_path / "file" / "t.jsonl", cache=tmp_path / "c").start()
    with pytest.raises(OSError):
        session.ask([user("x")])
    assert connect(cache=tmp_path / "c").start().ask([user("x")]).attempts == 0  # nothing was lost


def test_replay_refuses_as_the_model_does(transcript):
    session = Replay(transcript).start()
    with pytest.raises(InvalidRequest, match="cannot continue"):
        session.submit([])
    with pytest.raises(InvalidRequest, match="log-probabilities of given text"):
        session.score([user("x")], ["a"])
