"""A session that has read the beginning of a conversation is only told what is new."""

import base64
import io

import pytest
from PIL import Image

from clvr_jax.backends.protocol import assistant, system, user
from clvr_jax.serving.conversations import Conversations, History
from clvr_jax.serving.limits import Limits
from tests.serving.conftest import eventually, serving
from tests.serving.fake import FakeVlm


@pytest.fixture
def server():
    with serving(Limits(kept_conversations=3)) as running:
        yield running


def red(size=(4, 4)):
    return Image.new("RGB", size, "red")


def content_of(answer):
    assert answer.status == 200, answer.raw
    return answer.json["choices"][0]["message"]["content"]


def told(server):
    session, messages, _ = server.vlm.told[-1]
    return session, [message.text for message in messages]


def url_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_the_next_turn_tells_only_what_is_new(server):
    first = content_of(server.say("a b"))
    session, texts = told(server)
    assert texts == ["a b"]
    second = server.say("a b", first, "c")
    assert told(server) == (session, ["c"])
    assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    content_of(server.say("a b", first, "c", content_of(second), "d"))
    assert told(server) == (session, ["d"])
    assert len(server.vlm.open) == 1


def test_a_streamed_turn_is_kept_like_any_other(server):
    assert server.say("a", stream=True).status == 200
    session, _ = told(server)
    parts = [{"type": "text", "text": "you"}, {"type": "text", "text": " said: a"}]
    content_of(server.say("a", parts, "b"))  # the same reply, in other pieces
    assert told(server) == (session, ["b"])


def test_a_system_message_and_pictures_belong_to_the_history(server):
    def ask(colour, rules="be kind", more=()):
        picture = {
            "type": "image_url",
            "image_url": {"url": url_of(Image.new("RGB", (4, 4), colour))},
        }
        messages = [
            {"role": "system", "content": rules},
            {"role": "user", "content": [picture, {"type": "text", "text": "x"}]},
            *more,
        ]
        return content_of(server.post({"model": server.vlm.name, "messages": messages}))

    reply = ask("red")
    session, _ = told(server)
    more = [{"role": "assistant", "content": reply}, {"role": "user", "content": "y"}]
    ask("blue", more=more)
    ask("red", "be rude", more)
    others = {told(server)[0], server.vlm.told[-2][0]}
    assert session not in others and len(others) == 2
    ask("red", more=more)
    assert told(server) == (session, ["y"])


def test_an_edited_history_is_told_from_the_start(server):
    reply = content_of(server.say("a"))
    session, _ = told(server)
    for history in (["A", reply, "b"], ["a", reply + "!", "b"], ["a", reply, "b", "mine", "c"]):
        content_of(server.say(*history))
        if history[:2] == ["a", reply]:  # the beginning is the same: an own reply goes along
            assert told(server) == (session, history[2:])
        else:
            assert told(server)[0] is not session and told(server)[1] == history


def test_clients_with_the_same_history_do_not_share_a_session(server):
    reply = content_of(server.say("a"))
    session, _ = told(server)
    running = server.raw_say("", messages=history("a", reply, "hang"))
    eventually(lambda: told(server) == (session, ["hang"]))
    content_of(server.say("a", reply, "b"))
    assert told(server)[0] is not session and told(server)[1] == ["a", reply, "b"]
    running.close()
    eventually(lambda: session not in server.vlm.open)  # it was left in the middle of its turn


def test_two_sessions_with_the_same_history_serve_two_clients(server):
    replies = [content_of(server.say("a")) for _ in range(2)]
    sessions = {session for session, *_ in server.vlm.told}
    assert len(sessions) == 2 and replies[0] == replies[1]
    fields = {"messages": history("a", replies[0], "b"), "n": 2}
    assert server.say("x", **fields).status == 200
    assert {session for session, *_ in server.vlm.told[2:]} == sessions


def test_the_whole_history_again_is_not_a_request_to_go_on(server):
    reply = content_of(server.say("a"))
    content_of(server.say("a", reply))
    assert told(server)[1] == ["a", reply]


def test_only_the_latest_are_kept(server):
    replies = [content_of(server.say(str(i))) for i in range(5)]
    eventually(lambda: len(server.vlm.open) == 3)
    content_of(server.say("0", replies[0], "x"))
    assert told(server)[1] == ["0", replies[0], "x"]
    content_of(server.say("4", replies[4], "x"))
    assert told(server)[1] == ["x"]


def test_a_failed_turn_is_not_kept(server):
    reply = content_of(server.say("a"))
    session, _ = told(server)
    assert server.say("a", reply, "fail").status == 500
    eventually(lambda: session not in server.vlm.open)
    content_of(server.say("a", reply, "b"))
    assert told(server)[0] is not session


def test_none_are_kept_where_none_are_wanted():
    with serving(Limits(kept_conversations=0)) as server:
        reply = content_of(server.say("a"))
        eventually(lambda: not server.vlm.open)
        content_of(server.say("a", reply, "b"))
        assert told(server)[1] == ["a", reply, "b"]


def history(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


@pytest.mark.parametrize(
    "one,other",
    [
        ([user("ab")], [user("a", "b")]),
        ([user("ab", "c")], [user("a", "bc")]),
        ([user("a"), user("b")], [user("a", "b")]),
        ([user("a")], [system("a")]),
        ([user(red((2, 8)))], [user(red((8, 2)))]),
        ([user(red())], [user(red().tobytes().decode("latin-1"))]),
        ([user("a"), assistant("b")], [user("a"), user("b")]),
        ([user("é")], [user("e\u0301")]),
    ],
)
def test_different_conversations_have_different_keys(one, other):
    assert History(one).keys[-1] != History(other).keys[-1]


def test_a_key_is_the_same_wherever_a_reply_comes_from():
    told = [user("a", red()), assistant("b"), user("c")]
    assert History(told[:1]).key_after("b") == History(told).keys[1]
    assert History(told).key_after("d") == History([*told, assistant("d"), user("e")]).keys[3]
    assert History([user("a")]).key_after("bc") == History([user("a"), assistant("b", "c")]).keys[1]


def test_the_longest_known_beginning_wins():
    vlm = FakeVlm()
    kept = Conversations(vlm.start, 8)
    told = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    keys = History(told).keys
    short, long = vlm.start(), vlm.start()
    kept.put(keys[3], long)
    kept.put(keys[1], short)
    assert kept.take(History(told)) == (long, 4)
    assert kept.take(History(told)) == (short, 2)
    new, known = kept.take(History(told))
    assert known == 0 and new not in (short, long)
    kept.put(keys[1], new)
    kept.close()
    assert vlm.open == {short, long}  # they are the takers' to close
    kept.put(keys[1], short)
    assert vlm.open == {long}
