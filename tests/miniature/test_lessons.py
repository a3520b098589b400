"""Lessons in seeing: what they say is true, in the forms that are asked for."""

import re
from collections import Counter

import numpy as np
import pytest

from clvr_jax.backends import requests
from clvr_jax.data import turns
from clvr_jax.miniature import blends, detect, held_out, lessons, splits
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.pictures import rendered
from clvr_jax.miniature.places import COORDINATES, PLACES, related
from clvr_jax.miniature.readings import SURE
from clvr_jax.miniature.samples import generator
from clvr_jax.miniature.scene import MOST, from_codes
from clvr_jax.miniature.teacher.looks import read_inventory
from clvr_jax.miniature.words import NUMBERS, enumerate_words


def drawn(task, count, start=0):
    return [lessons.lesson(generator(start, i), task) for i in range(count)]


def test_blank_pictures_stand_for_those_that_are_rendered_later():
    for task in (*lessons.SHORT, *lessons.LONG):
        for said in drawn(task, 4):
            blank = [image for message in said.messages for image in message.images]
            assert len(blank) == len(said.pictures)
            assert all(image is lessons.BLANK for image in blank)
            assert said.messages[-1].role == "assistant"


def test_inventories_are_right():
    for said in drawn("inventory", 20):
        scene = from_codes(said.pictures[0].codes)
        assert read_inventory(said.messages[-1].text) == scene


def test_critiques_name_the_kinds_of_faults_there_are():
    right = 0
    for said in drawn("critique", 30):
        asked, answer = said.messages
        goal = parse_prompt(requests.CRITIQUE.match(asked.text)["goal"])
        faults = goal.faults(from_codes(said.pictures[0].codes))
        unclear = len(said.pictures[0].unclear) + said.pictures[0].beside.any()
        kinds = [*(fault.kind for fault in faults), *["unclear"] * unclear]
        assert sorted(requests.faults(answer.text)) == sorted(kinds)
        right += not kinds
    assert 5 < right < 25


def test_what_is_unclear_is_said_of_where_it_is():
    """As the teacher's detector has it, whose reading the lessons stand for."""
    shown = [(said, said.pictures[0]) for said in drawn("critique", 120)]
    for said, picture in shown:
        check, *_ = said.messages[1].text.splitlines()
        cells = [COORDINATES[cell] for cell in picture.unclear]
        serving = re.search(r"So ([^.]*)\.", check)[1]
        for told in (check.split(". ")[0], serving):
            assert re.findall(r"([a-d][1-4])(?: asked| no)? unclear", told) == cells
        assert re.findall(r"But ([a-d][1-4]) unclear, the", check) == cells
    blurred = [picture for _, picture in shown if picture.unclear]
    assert 8 < len(blurred) < 30
    seen = detect.detect(rendered(blurred, 16))
    assert not seen.clean.any() and (seen.codes == [picture.codes for picture in blurred]).all()
    near = [p for _, p in shown if p.blend is not None and not p.unclear and not p.beside.any()]
    seen = detect.detect(rendered(near, 16))
    assert len(near) > 3 and seen.clean.all(), "what is nearly unclear is not said to be"


def test_many_things_are_unclear_where_that_is_all_that_is_learnt():
    given = drawn("clear", 40)
    for said in given:
        picture, told = said.pictures[0], said.messages[1].text
        cells = [COORDINATES[cell] for cell in picture.unclear]
        assert re.findall(r"at ([a-d][1-4]) unclear", told) == cells
        assert re.findall(r"([a-d][1-4]): a \w+ unclear", told.lower()) == cells
        assert told.count(":") == np.count_nonzero(picture.codes)
    pictures = [said.pictures[0] for said in given]
    seen = detect.detect(rendered(pictures, 16))
    unsure = [set(np.flatnonzero(row < SURE).tolist()) for row in seen.confidence]
    assert unsure == [set(picture.unclear) for picture in pictures]
    share = sum(map(len, unsure)) / sum(np.count_nonzero(p.codes) for p in pictures)
    assert 0.15 < share < 0.6


def test_what_is_unclear_stays_so_until_it_is_changed():
    kept = 0
    for said in drawn("story", 90, start=9):
        replies = [m.text for m in said.messages if m.role == "assistant"]
        for number, picture in enumerate(said.pictures[1:], 2):
            action = turns.parse(replies[number - 1], number).action
            if action.references:
                base = said.pictures[action.references[-1] - 1]
                same = [c for c in base.unclear if base.codes[c] == picture.codes[c]]
                assert set(same) <= set(picture.unclear)
                kept += len(same)
    assert kept > 3


def test_more_things_than_there_may_be_are_no_picture_to_stop_at(monkeypatch):
    """Of them the teacher's detector has as many, and it names the same ones."""
    monkeypatch.setattr(blends, "CROWDED", 0.7)
    crowds = []
    for said in drawn("story", 40, start=3):
        replies = [m.text for m in said.messages if m.role == "assistant"]
        for number, picture in enumerate(said.pictures, 1):
            told = replies[number]
            assert picture.beside.any() == ("and more. " in told) == ("and more no. " in told)
            if picture.beside.any():
                crowds.append(picture)
                action = turns.parse(told, number + 1).action
                assert action.kind == "generate" or number not in action.references[-1:]
    read = detect.detect(rendered(crowds, 16))
    assert len(crowds) > 3 and (read.counts > MOST).all() and not read.clean.any()
    both = [picture.codes + picture.beside for picture in crowds]
    np.testing.assert_array_equal(read.codes, both)
    first = [np.flatnonzero(codes)[:MOST] for codes in both]
    assert all(set(np.flatnonzero(p.codes)) == set(f) for p, f in zip(crowds, first, strict=True))


def test_differences_are_of_one_seed():
    for said in drawn("difference", 10):
        before, after = said.pictures
        assert before.seed == after.seed


def test_stories_are_turns_as_they_are_trained():
    lengths, stopped = [], 0
    for said in drawn("story", 12):
        replies = [message for message in said.messages if message.role == "assistant"]
        parsed = [turns.parse(reply.text, n) for n, reply in enumerate(replies, 1)]
        stopped += parsed[-1].stop
        assert all(turn.action for turn in parsed[:-1])
        if parsed[-1].stop:
            goal = parse_prompt(said.messages[1].text)
            assert goal.holds(from_codes(said.pictures[-1].codes)), "it stops when all is right"
            assert not said.pictures[-1].unclear and not said.pictures[-1].beside.any()
        lengths.append(len(replies))
    assert stopped > 8 and len(set(lengths)) > 2
    assert max(lengths) <= lessons.LONGEST + 1


def test_nothing_held_out_is_read():
    for task in (*lessons.SHORT, *lessons.LONG):
        for said in drawn(task, 6, start=5):
            for picture in said.pictures:
                assert held_out.is_clean(from_codes(picture.codes)), task


def test_nothing_held_out_is_said_and_no_prompt_of_another_split():
    """Not in critiques, which say what things should be, nor in the steps of a drawing."""
    pairs = {f"{colour} {shape}" for shape, colour in held_out.PAIRS}
    for said in drawn("critique", 60, start=5):
        assert not any(pair in said.messages[-1].text for pair in pairs), said
    partial = 0
    for said in drawn("story", 80, start=5):
        goal = said.messages[1].text
        replies = [message.text for message in said.messages if message.role == "assistant"]
        for number, text in enumerate(replies, 1):
            action = turns.parse(text, number).action
            assert action is None or splits.may_train(action), action
            partial += bool(action) and action.kind == "generate" and action.prompt != goal
    assert partial > 2


def test_shares_of_lessons_are_given_by_name():
    assert lessons.shares({"story": 0.5, "caption": 2, "verify": 0.0}) == (
        {"caption": 2},
        {"story": 0.5},
    )
    with pytest.raises(ValueError, match="no lessons captoin; choose from inventory, caption"):
        lessons.shares({"captoin": 1.0})
    with pytest.raises(ValueError, match=r"'caption': -1.*none may be negative"):
        lessons.shares({"caption": -1})


def test_tasks_are_drawn_by_their_shares():
    for tasks in (lessons.SHORT, lessons.LONG):
        assert sum(tasks.values()) == pytest.approx(1)
        rng = generator(0, 0)
        counts = Counter(lessons.some_task(rng, tasks) for _ in range(2000))
        assert counts.keys() == tasks.keys()
        assert all(abs(counts[task] / 2000 - share) < 0.05 for task, share in tasks.items())


def test_checks_are_answered_line_by_line_and_truly():
    right = edited = 0
    for said in drawn("verify", 40):
        asked, reply = said.messages
        questions = requests.VERIFY.match(asked.text)["questions"].splitlines()
        answers = requests.checks(reply.text, len(questions))
        edited += len(said.pictures) == 2
        if len(said.pictures) == 1:  # the last asks for the number of all things
            words = questions[-1].removeprefix("is there ").removeprefix("are there ").split()
            count = len(from_codes(said.pictures[0].codes).things)
            assert answers[-1] == (words[0] == NUMBERS[count - 1])
        right += all(answers)
    assert 8 < right < 32 and 6 < edited < 30


def test_the_better_of_two_pictures_is_chosen():
    chosen = set()
    for said in drawn("choose", 30):
        asked, reply = said.messages
        goal = parse_prompt(requests.CHOOSE.match(asked.text)["goal"])
        wrong = [len(goal.faults(from_codes(picture.codes))) for picture in said.pictures]
        choice = requests.choice(reply.text)
        if 0 in wrong:
            assert choice == ("tie" if wrong == [0, 0] else "AB"[wrong.index(0)])
        chosen.add(choice)
    assert chosen == {"A", "B", "tie"}
    assert all(len({picture.seed for picture in said.pictures}) == 2 for said in drawn("choose", 4))


def test_proxy_prompts_and_narratives_end_a_story():
    edits = 0
    for said in drawn("proxy", 12):
        assert requests.PROXY.match(said.messages[-2].text) is not None
        action = turns.parse(said.messages[-3].text, len(said.pictures) + 1).action
        proxy = requests.proxy(said.messages[-1].text)
        assert parse_prompt(proxy.scene).count > 0 and proxy.references == action.references
        edits += action.kind == "edit"
    assert 2 < edits < 12
    for said in drawn("narrate", 6):
        asked, reply = said.messages
        lines = requests.NARRATE.match(asked.text)["steps"].splitlines()
        assert len(lines) == len(said.pictures) == len(reply.text.splitlines()) - 1


def test_texts_alone_are_lessons_too():
    for task in ("checklist", "rewrite", "repeat", "compare", "find", "need"):
        assert all(not said.pictures for said in drawn(task, 4))
    for said in drawn("repeat", 8):
        assert said.messages[1].text == lessons.REPEAT.match(said.messages[0].text)["text"]
    for said in drawn("rewrite", 8):
        goal = parse_prompt(requests.REWRITE.match(said.messages[0].text)["goal"])
        written = parse_prompt(said.messages[1].text)
        assert written.count == goal.count and all(group.place for group in written.groups)


def test_what_is_needed_is_all_that_was_asked_for_and_what_is_said_of_it_in_the_same_words():
    related = 0
    for said in drawn("need", 60):
        goal = parse_prompt(lessons.NEED.match(said.messages[0].text)["text"])
        things, *relations = said.messages[1].text.rstrip(".").split(". ")
        assert parse_prompt(said.messages[1].text) == goal
        for each in relations:
            first, second = re.fullmatch("The (.*) is (?:.*?) the (.*)", each).groups()
            words = re.split(", | and ", things.lower())
            for end in (first, second):
                assert any(re.fullmatch(f"an? {end}( in the .*)?", told) for told in words)
        related += bool(relations)
    assert 20 < related < 50, "few prompts say how things lie, and it is hard"


def test_comparisons_are_true_and_half_of_them_are_wrong():
    """Judged by the words alone, as whoever reads them has to."""
    verdicts = []
    for said in drawn("compare", 60):
        asked = lessons.COMPARE.match(said.messages[0].text)["pairs"].splitlines()
        answered = said.messages[1].text.rstrip(".").split(". ")
        assert len(asked) == len(answered) == 4
        for line, judged in zip(asked, answered):
            wanted = line.split(" at ")[0]
            assert judged.lower().startswith(wanted)
            verdicts.append(not re.search(r" no\b|missing", judged))
            for seen, wish, no in re.findall(r"([a-z]+) for (\w+)( no)?(?:,|$)", judged):
                assert (seen == wish) == (not no), judged
            if " is " in line:
                first, second = (COORDINATES.index(cell) for cell in re.findall("[a-d][1-4]", line))
                word = re.search("left of|right of|above|below", line)[0]
                right = related(first, word, second)
            else:
                group, things = parse_prompt(wanted).groups[0], named(line)
                assert named(judged) == things
                right = len(things) == group.count and all(fits(group, *t) for t in things)
            assert right == verdicts[-1], judged
    assert 0.4 < sum(verdicts) / len(verdicts) < 0.6


def test_what_is_looked_for_is_found_or_told_why_not():
    """What lies nearest is not so, or serves already."""
    short = Counter()
    for said in drawn("find", 40):
        fields = lessons.FIND.match(said.messages[0].text)
        wanted, there = fields["things"].splitlines(), named(fields["seen"])
        *answered, serving = said.messages[1].text.rstrip(".").split(". ")
        used = []
        for want, answer in zip(wanted, answered, strict=True):
            group = parse_prompt(want).groups[0]
            assert answer.lower().startswith(f"{want} at ")
            found = [each for each in answer.split(", at ") if each.endswith(" asked")]
            assert all(each.endswith(f"{named(each)[0][0]} asked") for each in found)
            fitting = [t for t in there if fits(group, *t) and t not in used]
            assert named(", ".join(found)) == fitting
            used += fitting
            last = answer.split(", at ")[-1]
            if len(found) < group.count:
                why = re.search(" no$|, used$", last)[0]
                short[why] += 1
                assert fits(group, *named(last)[0]) == (why == ", used")
                assert why == " no" or named(last)[0] in used
        words = [f"{thing[0]} {'asked' if thing in used else 'no'}" for thing in there]
        assert serving == f"So {enumerate_words(words)}"
    assert short[" no"] > 40 and short[", used"] > 40


def named(text):
    """Return (cell, size, colour, shape) of each thing that a text names."""
    return re.findall(r"\b([a-d][1-4]): an? (small|large) (\w+) (\w+)", text)


def fits(group, cell, size, colour, shape):
    return (
        group.size in (None, size)
        and group.colour in (None, colour)
        and group.shape in (None, shape)
        and (group.place is None or COORDINATES.index(cell) in PLACES[group.place])
    )


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="no lessons of task 'sums'; choose from inventory"):
        lessons.lesson(generator(0, 0), "sums")
