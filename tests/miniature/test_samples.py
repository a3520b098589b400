"""Training data drawn on the fly: pure functions of seed and number, nothing held out."""

import numpy as np
import pytest

from clvr_jax.data.plan import Epochs, Step
from clvr_jax.generate.prompt import render as templated
from clvr_jax.miniature import held_out, parse, samples, tokenizer
from clvr_jax.miniature.batches import DrawingBatches, crowds
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import PLACES
from clvr_jax.miniature.references import by_kind
from clvr_jax.miniature.scene import from_codes, thing
from launch.folders import SEEING


@pytest.fixture(scope="module")
def words():
    return tokenizer.train(tokenizer.corpus(120), "", SEEING)


def batches(words, **changes):
    given = dict(
        tokenizer=words,
        encode=lambda codes, seeds: np.stack([codes, seeds[:, None] + 0 * codes], axis=-1),
        split=Split.TRAIN,
        texts=(32, 56, 112),
        tasks=(8, 4, 2),
        accumulation=2,
        rows=4,
        seed=3,
        dropout=0.25,
    )
    return DrawingBatches(**(given | changes))


def test_the_tokenizer_has_qwens_special_tokens_in_order(words):
    assert words.convert_ids_to_tokens(list(range(9))) == list(SEEING)
    assert len(words) <= tokenizer.VOCABULARY
    framed = templated("a large red circle")
    assert words.decode(words.encode(framed)) == framed
    assert len(words.encode(framed)) == 12 + 4, "words and the frame are single tokens"


def test_a_sample_is_a_function_of_seed_and_number():
    draw = lambda seed, number, references: samples.drawing(
        samples.generator(seed, number), references
    )
    for references in (0, 1, 2):
        one, other = draw(1, 5, references), draw(1, 5, references)
        assert one.text == other.text and one.target.seed == other.target.seed
        assert draw(2, 5, references) != one and draw(1, 6, references).text != one.text


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="3 references; drawings of this world have 0, 1 or 2"):
        samples.drawing(samples.generator(0, 0), 3)
    with pytest.raises(ValueError, match="row 1048576 of a round"):
        samples.row_generator(0, 1, samples.ROUND, samples.Stream.CROWDS)


def test_what_an_edit_does_not_name_stays():
    for number in range(20):
        given = samples.drawing(samples.generator(0, number), 1)
        (before,) = given.references
        assert before.seed == given.target.seed
        assert 1 <= (before.codes != given.target.codes).sum() <= 2
        given = samples.drawing(samples.generator(0, number), 2)
        first, second = given.references
        assert second.seed == given.target.seed != first.seed
        assert (second.codes != given.target.codes).sum() == 1


def test_prompts_are_met_and_some_say_all():
    whole = 0
    for number in range(200):
        given = samples.drawing(samples.generator(4, number), 0)
        goal, scene = parse.parse_prompt(given.text), from_codes(given.target.codes)
        assert goal.holds(scene), given.text
        assert held_out.split_of(goal, given.text) is Split.TRAIN, given.text
        whole += all(len(PLACES.get(group.place, ())) == 1 for group in goal.groups)
    assert 30 < whole < 80, "a quarter names every cell"


def test_edits_often_say_which_of_several_they_mean():
    said = alike = 0
    for number in range(200):
        given = samples.drawing(samples.generator(5, number), 1)
        scene = from_codes(given.references[0].codes)
        edit = parse.parse_edit(given.text)
        if edit.thing:
            said += bool(edit.thing.place or edit.thing.word)
            alike += not by_kind(scene, edit.thing.find(scene))
    assert said > 40 and alike > 15


def test_nothing_held_out_is_trained():
    for number in range(60):
        for references in (0, 1, 2):
            given = samples.drawing(samples.generator(9, number), references)
            for picture in (given.target, *given.references):
                assert held_out.is_clean(from_codes(picture.codes)), given
        crowded = samples.crowded_picture(samples.generator(9, number))
        pairs = {
            (t.shape, t.colour)
            for t in (thing(c, int(k)) for c, k in enumerate(crowded.codes) if k)
        }
        assert not pairs & held_out.PAIRS


def test_batches_hold_what_was_planned(words):
    make = batches(words)
    steps = Epochs(make.plan, steps=28)
    kinds = [len(step.static.references) for step in list(steps)[:14]]
    assert sorted(kinds) == [0] * 8 + [1] * 4 + [2] * 2
    seen = set()
    for step in steps:
        batch = make(step)
        assert batch["ids"].shape == (2, 4, step.static.text)
        assert batch["latents"].shape == (2, 4, 16, 2)
        assert len(batch["reference_latents"]) == len(step.static.references)
        assert (batch["lengths"] <= step.static.text).all()
        seen |= set(batch["latents"][:, :, 0, 1].flat)
    assert len(seen) == 28 * 8, "no sample comes twice"


def test_prompts_of_a_round_are_sorted_into_lengths_and_none_is_lost(words):
    make = batches(words, dropout=0.0)
    texts = {}
    for step in make.plan(5):
        if not step.static.references:
            batch = make(step._replace(epoch=5))
            texts.setdefault(step.static.text, []).extend(batch["lengths"].flat)
    assert max(texts[32]) <= min(texts[56]) and max(texts[56]) <= min(texts[112])
    assert sum(map(len, texts.values())) == 64


def test_prompts_too_long_for_their_place_are_drawn_anew(words, monkeypatch):
    make = batches(words, texts=(24, 32, 112), tasks=(8, 0, 0), dropout=0.0)
    for step in make.plan(0):
        assert make(step)["lengths"].max() <= step.static.text
    monkeypatch.setattr("clvr_jax.miniature.batches._TRIES", 20)
    make = batches(words, texts=(12, 32, 112), tasks=(0, 0, 1))
    with pytest.raises(ValueError, match=r"none has at most 12 tokens.*give longer ones"):
        make(make.plan(0)[0])


def test_processes_share_a_step(words):
    step = batches(words).plan(0)[0]
    whole = batches(words)(step)
    halves = [batches(words, process=(i, 2))(step) for i in range(2)]
    for name in ("ids", "lengths", "latents"):
        together = np.concatenate([half[name] for half in halves], axis=1)
        np.testing.assert_array_equal(together, whole[name])


def test_some_texts_are_dropped(words):
    make, empty = batches(words, dropout=0.25), batches(words, dropout=0.0)
    dropped = total = 0
    for epoch in range(1):
        for step in make.plan(epoch):
            step = step._replace(epoch=epoch)
            dropped += (make(step)["lengths"] != empty(step)["lengths"]).sum()
            total += step.rows.size
    assert 0.12 < dropped / total < 0.38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": (32, 32, 96)}, "increasing"),
        ({"tasks": (4, 4, 2)}, "multiple of 8"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_wrong_numbers_are_refused(words, change, message):
    with pytest.raises(ValueError, match=message):
        batches(words, **change)


def test_crowded_pictures_are_drawn_anew_every_step():
    step = lambda epoch: Step(64, np.arange(6).reshape(2, 3), epoch)
    one, other = crowds(step(0), seed=0), crowds(step(1), seed=0)
    assert one["codes"].shape == (2, 3, 16) and one["seeds"].dtype == np.uint32
    assert not np.array_equal(one["codes"], other["codes"])
    np.testing.assert_array_equal(crowds(step(0), seed=0)["codes"], one["codes"])
