"""Lessons in seeing: what they say is true, in the forms that are asked for."""

import pytest

from clvr_jax.backends import requests
from clvr_jax.data import turns
from clvr_jax.miniature import held_out, lessons
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.samples import generator
from clvr_jax.miniature.scene import from_codes
from clvr_jax.miniature.teacher.looks import read_inventory


def drawn(task, count, start=0):
    return [lessons.lesson(generator(start, i), task) for i in range(count)]


def test_blank_pictures_stand_for_those_that_are_rendered_later():
    for task in (*lessons.TASKS, lessons.STORY):
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
        assert sorted(requests.faults(answer.text)) == sorted(fault.kind for fault in faults)
        right += not faults
    assert 5 < right < 25


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
        lengths.append(len(replies))
    assert stopped > 8 and len(set(lengths)) > 2
    assert max(lengths) <= lessons.LONGEST + 1


def test_nothing_held_out_is_read():
    for task in (*lessons.TASKS, lessons.STORY):
        for said in drawn(task, 6, start=5):
            for picture in said.pictures:
                assert held_out.is_clean(from_codes(picture.codes)), task


def test_shares_of_tasks_add_up():
    assert sum(lessons.TASKS.values()) == pytest.approx(1)


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="no lessons of task 'sums'; choose from inventory"):
        lessons.lesson(generator(0, 0), "sums")
