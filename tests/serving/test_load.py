"""Many requests at once."""

import asyncio
import threading
import time

import openai

from clvr_jax.serving.limits import Limits
from tests.serving.conftest import eventually, serving, talk
from tests.serving.fake import FakeVlm

NAME = FakeVlm.name


def together(server, texts, **fields):
    """Return the replies to all texts, or the errors, asked for at once."""

    async def ask_all():
        async with server.client(openai.AsyncOpenAI) as client:
            create = client.chat.completions.create
            asked = [create(model=NAME, messages=talk(text), **fields) for text in texts]
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(ask_all())


def test_200_requests_at_once_all_get_their_own_reply():
    with serving(Limits(max_queue=200, kept_conversations=50)) as server:
        replies = together(server, [f"number {i}" for i in range(200)])
        texts = [reply.choices[0].message.content for reply in replies]
        assert texts == [f"you said: number {i}" for i in range(200)]
        eventually(lambda: len(server.vlm.open) == 50)


def test_waiting_for_replies_takes_no_thread_of_the_server():
    with serving(Limits(max_queue=64, workers=2)) as server:
        before = threading.active_count()
        waiting = [server.raw_say("hang", stream=i % 2 == 0) for i in range(60)]
        eventually(lambda: server.health()["running"] == 60)
        # of these, 60 are the model's own
        assert threading.active_count() - before - 60 <= 4
        assert server.say("x").status == 200
        for connection in waiting:
            connection.close()
        eventually(lambda: server.vlm.cancels == 60)


def test_submitting_happens_in_a_few_other_threads_and_blocks_nobody():
    with serving(Limits(workers=3)) as server:
        slow = threading.Thread(target=together, args=(server, ["prepare 0.3"] * 6))
        slow.start()
        eventually(lambda: len(server.vlm.told) == 3)
        start = time.monotonic()
        state = server.health()
        assert time.monotonic() - start < 0.2, "the event loop was blocked"
        assert (state["running"], state["waiting"]) == (0, 6)
        assert len(server.vlm.told) == 3
        slow.join()
        assert len(server.vlm.told) == 6 and len(server.vlm.threads) <= 3


def test_a_full_queue_refuses_and_recovers():
    with serving(Limits(max_queue=4)) as server:
        waiting = [server.raw_say("hang") for _ in range(3)]
        eventually(lambda: server.health()["running"] == 3)
        answer = server.say("x", n=2)  # there is room for one
        assert answer.status == 429 and answer.error["code"] == "queue_full"
        waiting.append(server.raw_say("hang"))
        eventually(lambda: server.health()["running"] == 4)
        answer = server.say("x")
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert "4 requests are being answered" in answer.error["message"]
        for connection in waiting:
            connection.close()
        eventually(lambda: server.health()["running"] == 0)
        assert server.say("x", n=4).status == 200


def test_a_burst_beyond_the_queue_loses_nothing_and_mixes_nothing():
    with serving(Limits(max_queue=4)) as server:
        replies = together(server, [f"slow 0.0{i}" for i in range(1, 10)] * 3)
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        assert refused and all(isinstance(error, openai.RateLimitError) for error in refused)
        said = [r.choices[0].message.content for r in replies if not isinstance(r, Exception)]
        assert said and set(said) == {"one two three four "}
        assert server.vlm.peak <= 4 and len(server.vlm.told) == len(said)
