"""What the engine promises underneath: caches, budgets, compiles, grammars, meshes."""

import json
import logging

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clvr_jax.backends.local import reader as readers
from clvr_jax.backends.local.sequence import Sequence, bucket, power
from clvr_jax.backends.protocol import InvalidRequest, Options, user
from launch import build, build_vlm
from launch import toy as toys
from tests.backends import toy

GREEDY = Options(max_tokens=24)
SCHEMA = {
    "type": "object",
    "properties": {
        "action": {"enum": ["generate", "edit", "stop"]},
        "references": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["action", "references"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vlm():
    model = toy.load()
    yield model
    model.close()


@pytest.fixture
def compiles(caplog):
    """Names of the programs that were compiled since the last look."""
    caplog.set_level(logging.DEBUG, logger="jax._src.interpreters.pxla")

    def look() -> list[str]:
        lines = [r.message for r in caplog.records if r.message.startswith("Compiling")]
        caplog.clear()
        return [line.split(" with ")[0] for line in lines]

    return look


def three_turns(tokens: int = 24):
    return [
        ([user("look", toy.picture(turn, 64 + 64 * turn, 128), "and tell " * 12)], tokens)
        for turn in range(3)
    ]


def test_places_come_in_few_sizes():
    sizes = sorted({bucket(n) for n in range(1, 40000)})
    assert sizes[:6] == [128, 192, 256, 384, 512, 768] and len(sizes) < 20
    assert all(bucket(n) >= n for n in range(1, 5000))
    assert [power(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16] and power(3, 16) == 16


def test_a_growing_conversation_compiles_nothing_new(vlm, compiles):
    """Turn after turn, with pictures, in the sizes that were seen: not one program."""

    def converse(seed):
        session = vlm.start()
        for turn in range(6):
            parts = [f"turn {turn} of {seed}"] + [toy.picture(seed + turn, 64, 128)] * (turn % 2)
            session.ask([user(*parts)], Options(max_tokens=20, temperature=0.5 * turn, seed=3))
        session.close()

    stops, vlm.processor.stops = vlm.processor.stops, (10**6,)  # every turn is 20 tokens long
    try:
        converse(10)
        compiles()
        converse(20)
        assert compiles() == []
    finally:
        vlm.processor.stops = stops
    # the counter counts: a picture of another bucket is another program
    vlm.start().ask([user(toy.picture(1, 400, 400))], GREEDY)
    assert any("look" in line for line in compiles())


def test_a_batch_that_comes_and_goes_compiles_nothing_new(vlm, compiles):
    def crowd():
        pending = [vlm.start().submit([user(f"n {i:02d}")], GREEDY) for i in range(12)]
        return [p.result(60.0).text for p in pending]

    first = crowd()
    crowd()
    compiles()
    assert crowd() == first
    assert len(compiles()) <= 2  # how turns meet in the batch varies from run to run


@pytest.mark.slow
def test_reading_turn_by_turn_is_reading_at_once(vlm):
    """Scores after three turns with pictures, across bucket boundaries, pieces of 32 tokens."""

    def scores(stops, piece=readers.PIECE):
        seq = Sequence(list(whole.ids), list(whole.pictures))
        old, readers.PIECE = readers.PIECE, piece
        try:
            for stop in stops:
                out = vlm.engine.call(lambda stop=stop: vlm.engine._reader.read(seq, stop))
        finally:
            readers.PIECE = old
        return np.asarray(out)[0], seq.position

    session = vlm.start()
    ends = []
    for messages, tokens in three_turns():
        reply = session.ask(messages, Options(max_tokens=tokens))
        ends.append(reply.usage.prompt)
    whole = session._sequence
    assert bucket(ends[0]) < bucket(ends[1]) < bucket(ends[2]), "no bucket boundary is crossed"
    once, position = scores([len(whole.ids)])
    for stops in ([*ends, len(whole.ids)], [ends[0], len(whole.ids)]):
        parts, other = scores(stops)
        assert other == position
        np.testing.assert_allclose(parts, once, atol=1e-5 * np.abs(once).max())
    pieces, other = scores([len(whole.ids)], piece=32)  # cuts pictures in two
    np.testing.assert_allclose(pieces, once, atol=1e-5 * np.abs(once).max())
    # and what the session itself holds goes on in the same way
    assert whole.position == position and whole.cached == len(whole.ids)


def test_an_evicted_conversation_goes_on_as_if_it_had_not_been():
    def converse(vlm, sessions=7):
        open_ = [vlm.start() for _ in range(sessions)]
        for messages, tokens in three_turns(30):
            for session in open_:
                session.ask(messages, Options(max_tokens=tokens, temperature=1.0, seed=5))
        return [session.ids for session in open_]

    roomy, tight = toy.load(context=512), toy.load(context=512, cache_bytes=3 * 2**20)
    try:
        assert converse(tight) == converse(roomy)
        assert tight.engine.evictions > 0 and roomy.engine.evictions == 0
        assert tight.engine.load()["cache_bytes"] <= tight.engine.cache_bytes
    finally:
        roomy.close()
        tight.close()


def test_a_sampled_image_token_is_text(vlm):
    """Its position counts as one, also when the conversation is read anew."""
    session = vlm.start()
    session.ask([user("a", toy.picture())], GREEDY)
    image = vlm.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    seq = session._sequence
    seq.ids[-3] = image
    position = seq.position
    vlm.engine.call(seq.evict)
    reply = session.ask([user("b")], Options(max_tokens=1))
    assert reply.usage.cached == 0
    assert seq.position - position == len(seq.ids) - reply.usage.prompt + (
        len(vlm.processor.later([{"role": "user", "parts": ["b"]}], False).ids)
    )


def test_logprobs_are_the_scores_of_the_same_text(vlm):
    session = vlm.start()
    options = Options(max_tokens=12, temperature=0.9, seed=4, logprobs=3)
    reply = session.ask([user("tell", toy.picture())], options)
    assert len(reply.tokens) == len(session.ids) - reply.usage.prompt - (
        session.ids[-1] in vlm.processor.stops
    )
    other = vlm.start()
    ids = list(session.ids[reply.usage.prompt :])[: len(reply.tokens)]
    turn = vlm.processor.first([{"role": "user", "parts": ["tell", toy.picture()]}])
    other._sequence.append(turn)
    scores = vlm.engine.call(lambda: vlm.engine.score(other._sequence, [ids]))[0]
    np.testing.assert_allclose([t.logprob for t in reply.tokens], scores, atol=2e-5)
    for token in reply.tokens:
        best = [p for _, _, p in token.rivals]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token.logprob <= best[0] + 1e-5


def test_scoring_leaves_a_session_alone(vlm):
    session, twin = vlm.start(), vlm.start()
    for one in (session, twin):
        one.ask([user("a", toy.picture())], GREEDY)
    before = session.ids
    scores = session.score([user("yes or no?", toy.picture(2))], ["yes", "no", "yes indeed"])
    assert session.ids == before
    again = session.score([user("yes or no?", toy.picture(2))], ["no", "yes"])
    assert [s.tokens for s in again] == [scores[1].tokens, scores[0].tokens]
    assert scores[2].tokens[:3] == pytest.approx(scores[0].tokens, abs=1e-5)
    assert scores[0].logprob == pytest.approx(sum(scores[0].tokens))
    # of the open assistant turn itself, and with no messages at all
    assert session.score([], ["x"])[0].logprob < 0
    assert session.ask([user("b")], GREEDY).text == twin.ask([user("b")], GREEDY).text
    with pytest.raises(InvalidRequest, match="empty"):
        session.score([user("x")], [""])


def test_json_follows_its_schema_beside_free_text(vlm):
    """Rows with and without a grammar in one batch; free ones say what they say alone."""
    alone = vlm.start().ask([user("free")], GREEDY).text
    made = [
        vlm.start().submit(
            [user(f"json {i}")],
            Options(max_tokens=400, temperature=1.0, seed=i, schema=SCHEMA),
        )
        for i in range(4)
    ]
    free = vlm.start().submit([user("free")], GREEDY)
    done = 0
    for pending in made:
        reply = pending.result(120.0)
        assert reply.times.constrain > 0
        if reply.finish == "stop":
            value = json.loads(reply.text)
            assert value["action"] in SCHEMA["properties"]["action"]["enum"]
            assert all(isinstance(n, int) for n in value["references"])
            done += 1
    assert done, "no turn came to its end"
    reply = free.result(60.0)
    assert reply.text == alone and reply.times.constrain == 0


def test_a_grammar(vlm):
    options = Options(max_tokens=50, grammar='start: "yes" | "no" | /[0-9]{3}/', temperature=1.0)
    for _ in range(4):
        reply = vlm.start().ask([user("x")], options)
        assert reply.finish == "stop"
        assert reply.text in ("yes", "no") or (len(reply.text) == 3 and reply.text.isdigit())


def test_free_reasoning_then_a_constrained_answer(vlm):
    """The controller's way: think freely, then go on in the same turn under a schema."""
    session = vlm.start()
    session.ask([user("plan", toy.picture())], Options(max_tokens=7))
    before = session.ids
    reply = session.ask([], Options(max_tokens=300, schema=SCHEMA, temperature=1.0, seed=2))
    assert session.ids[: len(before)] == before
    assert reply.text.lstrip().startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2, "fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_a_mesh_says_what_one_device_says(vlm, sizes):
    mesh = build.make_mesh(sizes)
    spread = toy.load(mesh=mesh)
    try:
        params = spread.engine._reader._params["language"]
        kernel = params["layers_0"]["self_attn"]["qkv_proj"]["kernel"]
        assert kernel.sharding.spec == P("fsdp", "tensor")
        turns = [[user("a", toy.picture())], [user("b", toy.picture(3, 64, 64))]]
        ours, theirs = vlm.start(), spread.start()
        for turn in turns:
            assert theirs.ask(turn, GREEDY).text == ours.ask(turn, GREEDY).text
        assert theirs.ids == ours.ids
        cache = theirs._sequence.cache[0].keys
        assert cache.sharding.spec[1] == "tensor", "the cache is not spread over the heads"
        crowd = [spread.start().submit([user(f"n {i}")], GREEDY) for i in range(4)]
        for i, pending in enumerate(crowd):
            assert pending.result(120.0).text == vlm.start().ask([user(f"n {i}")], GREEDY).text
    finally:
        spread.close()


@pytest.mark.slow
def test_a_text_only_model(tmp_path):
    toys.write(tmp_path / "klein")
    folder = tmp_path / "klein" / "text_encoder"
    for file in (tmp_path / "klein" / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    component = build_vlm.find(str(folder))
    model = build_vlm.load_vlm(
        component, dtype="float32", cache_bytes=2**26, context=512, name="words"
    )
    try:
        session = model.start()
        first = session.ask([user("hello")], GREEDY)
        assert first.usage.completion > 0
        before = len(session.ids)
        assert session.ask([user("again")], GREEDY).usage.cached == before
        with pytest.raises(InvalidRequest, match="text only"):
            session.submit([user(toy.picture())])
    finally:
        model.close()
