"""Replies that are kept: the disk cache."""

import json
import logging
import threading

import pytest
from PIL import Image

from clvr_jax.backends.protocol import Options, TokenLogprob, Usage, system, user
from clvr_jax.backends.remote.cache import DiskCache, write_aside
from clvr_jax.backends.remote.records import reply_from, reply_record
from clvr_jax.backends.remote.request import Request, prepare
from tests.backends.remote.chat_server import fail, gated_stream, say

RED = Image.new("RGB", (8, 8), "red")
ASK = [user("what is this?", RED)]


def test_a_repeated_request_is_not_sent(server, connect, tmp_path):
    server.script += [fail(500), say("a red square", usage=(100, 4, 60))]
    vlm = connect(cache=tmp_path, price_input=1.0, price_output=1.0)
    first = vlm.start().ask(ASK)
    pieces = []
    second = vlm.start().ask(ASK, on_text=pieces.append)
    assert len(server.bodies) == 2 and second.text == first.text == "".join(pieces)
    assert first.usage.cost > 0 and second.usage == Usage(100, 60, 4, 0.0)
    assert (first.attempts, second.attempts) == (2, 0)
    assert second.times.total < 1 and second.times.decode == 0
    totals = vlm.totals()
    assert (totals.replies, totals.cached, totals.prompt) == (1, 1, 100)
    again = connect(cache=tmp_path).start().ask(ASK)  # another process, say
    assert again.text == first.text and len(server.bodies) == 2


def test_a_cached_reply_continues_the_session(server, connect, tmp_path):
    server.script += [say("one")]
    vlm = connect(cache=tmp_path)
    for _ in range(2):
        session = vlm.start()
        session.ask(ASK)
    session.ask([user("and?")])
    assert len(server.bodies) == 2
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_a_cached_reply_needs_no_budget(server, connect, tmp_path):
    connect(cache=tmp_path).start().ask(ASK)
    assert connect(cache=tmp_path, budget_tokens=0).start().ask(ASK).text == "ok"


OTHER_PIXEL = RED.copy()
OTHER_PIXEL.putpixel((7, 7), (254, 0, 0))


@pytest.mark.parametrize(
    "messages, options, fields",
    [
        ([user("what is this?", OTHER_PIXEL)], Options(), {}),
        ([user("what is this?", RED.resize((4, 16)))], Options(), {}),
        ([user(RED, "what is this?")], Options(), {}),
        ([user("what is that?", RED)], Options(), {}),
        ([user("what ", "is this?", RED)], Options(), {}),
        ([system("s"), *ASK], Options(), {}),
        (ASK, Options(seed=1), {}),
        (ASK, Options(temperature=0.5, seed=1), {}),
        (ASK, Options(max_tokens=9), {}),
        (ASK, Options(top_p=0.5), {}),
        (ASK, Options(stop=("a",)), {}),
        (ASK, Options(schema={"type": "string"}), {}),
        (ASK, Options(repetition_penalty=1.1), {}),
        (ASK, Options(), {"jpeg_quality": 90}),
        (ASK, Options(), {"extra_body": {"x": 1}}),
    ],
)
def test_any_difference_is_another_request(server, connect, tmp_path, messages, options, fields):
    connect(cache=tmp_path).start().ask(ASK)
    other = connect(cache=tmp_path, **fields)
    for _ in range(2):
        other.start().ask(messages, options)
        assert len(server.bodies) == 2


def test_model_url_and_order_of_a_schema_are_part_of_the_key():
    messages = (prepare(ASK[0]),)
    ab, ba = ({"properties": dict.fromkeys(names, 1)} for names in ("ab", "ba"))
    endpoint = {"model": "m", "base_url": "u"}
    requests = [
        Request(endpoint, messages, Options(schema=ab)),
        Request(endpoint, messages, Options(schema=ba)),
        Request({**endpoint, "model": "n"}, messages, Options(schema=ab)),
        Request({**endpoint, "base_url": "v"}, messages, Options(schema=ab)),
    ]
    assert len({request.key for request in requests}) == 4


def test_the_key_is_of_pixels_not_of_files(tmp_path):
    RED.save(tmp_path / "a.png", compress_level=0)
    RED.convert("P").save(tmp_path / "b.gif")
    pictures = [Image.open(tmp_path / name) for name in ("a.png", "b.gif")]
    digests = {prepare(user(p)).parts[0].digest for p in [RED, RED.convert("P"), *pictures]}
    assert len(digests) == 1
    shapes = [Image.new("RGB", size) for size in ((4, 4), (2, 8))] + [Image.new("RGBA", (3, 4), 0)]
    assert len({image.tobytes() for image in shapes}) == 1  # equal bytes, other pictures
    assert len({prepare(user(image)).parts[0].digest for image in shapes}) == 3


def test_samples_without_a_seed_are_not_kept(server, connect, tmp_path):
    sampled = Options(temperature=1.0)
    vlm = connect(cache=tmp_path)
    vlm.start().ask(ASK, sampled)
    vlm.start().ask(ASK, sampled)
    assert len(server.bodies) == 2 and not list(tmp_path.rglob("*.json"))
    vlm = connect(cache=tmp_path, cache_unseeded=True)
    vlm.start().ask(ASK, sampled)
    vlm.start().ask(ASK, sampled)
    assert len(server.bodies) == 3


def test_cancelled_replies_are_not_kept(server, connect, tmp_path):
    server.script += [gated_stream("one ", "more ")]
    server.gate.set()
    vlm = connect(cache=tmp_path)
    begun = threading.Event()
    pending = vlm.start().submit(ASK, on_text=lambda _: begun.set())
    assert begun.wait(5)
    pending.cancel()
    assert pending.result(5.0).finish == "cancelled"
    assert vlm.start().ask(ASK).text == "ok"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "shape", "list"])
def test_a_damaged_entry_is_reported_and_replaced(server, connect, tmp_path, caplog, damage):
    server.script += [say("right")]
    server.default = say("anew")
    vlm = connect(cache=tmp_path)
    vlm.start().ask(ASK)
    (file,) = tmp_path.rglob("*.json")
    text = file.read_text()
    spoiled = {
        "cut": text[: len(text) // 2],
        "empty": "",
        "text": text.replace('"right"', '"wrong"'),
        "shape": json.dumps({"reply": {}}),
        "list": "[]",
    }
    file.write_text(spoiled[damage])
    with caplog.at_level(logging.WARNING):
        assert vlm.start().ask(ASK).text == "anew"
    assert "is damaged" in caplog.text and file.name in caplog.text
    assert vlm.start().ask(ASK).text == "anew" and len(server.bodies) == 2


def test_a_folder_that_cannot_be_written_costs_no_reply(server, connect, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert connect(cache=tmp_path / "file").start().ask(ASK).text == "ok"
    assert "could not be written" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        write_aside(tmp_path / "a", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_writers_and_readers_at_once_see_whole_entries(server, connect, tmp_path, caplog):
    vlm = connect(cache=tmp_path)
    reply = vlm.start().ask(ASK)
    request = Request(vlm._config.identity(), (prepare(ASK[0]),), Options())
    found = []

    def work():
        cache = DiskCache(tmp_path)
        for _ in range(40):
            cache.store(request, reply)
            found.append(cache.load(request))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [reply] * 160 and not caplog.text
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == 1  # nothing is left aside


def test_records_keep_every_field(server, connect):
    reply = connect().start().ask(ASK, Options(seed=4, temperature=1.0))
    token = TokenLogprob("\ufffd", b"\xe2\x82", -0.5, (("é", "é".encode(), -1.5),))
    reply = type(reply)(**{**vars(reply), "tokens": (token,)})
    assert reply_from(json.loads(json.dumps(reply_record(reply)))) == reply
    with pytest.raises(ValueError):
        reply_from({**reply_record(reply), "finish": "maybe"})
