"""What is measured of a model that reads pictures, with one that sees all and one that dozes."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Options
from clvr_jax.miniature import detect, scores, splits
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.pictures import picture_of, rendered
from clvr_jax.miniature.prompts import KINDS
from clvr_jax.miniature.readings import certain
from clvr_jax.miniature.scene import from_codes
from clvr_jax.miniature.teacher import Policy, Teacher
from clvr_jax.miniature.teacher.layout import layout
from clvr_jax.miniature.teacher.looks import read_inventory
from clvr_jax.statistics import rate_of
from launch import build_vlm
from launch.evaluation import page, reading, view

COUNT = 24


class Dozing:
    """A model that answers every third question with words that mean nothing."""

    def __init__(self, vlm):
        self.vlm, self.asked = vlm, 0

    def start(self):
        self.asked += 1
        return Snore() if self.asked % 3 == 0 else self.vlm.start()


class Snore:
    text = "zzz"

    def submit(self, messages, options):
        return self

    def result(self):
        return self

    def close(self):
        pass


@pytest.fixture(scope="module")
def asked():
    found = {}
    for kind in KINDS:
        splits.extend(found, Split.DEV, kind, COUNT // len(KINDS))
    return list(found.values())


@pytest.fixture(scope="module")
def cases(asked):
    return reading.of_renders(asked)


def teacher():
    return Teacher(0, Policy(), detect.detect)


def test_renders_are_always_the_same_and_wrong_in_every_way(cases):
    told = "\n".join(f"{case.text}|{case.scene}|{sorted(case.faults)}" for case in cases)
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "735455f17f8b5bbf"
    more = splits.training(10)
    kinds = set().union(*(case.faults for case in reading.of_renders(more)))
    assert kinds == {*requests.FAULTS} - {"unclear"}, "renders are clear"


def test_renders_are_right_and_wrong(cases, asked):
    wrong = [case for case in cases if case.faults]
    assert COUNT / 4 < len(wrong) < COUNT * 0.9
    assert all(
        case.faults == {fault.kind for fault in prompt.goal.faults(case.scene)}
        for case, prompt in zip(cases, asked)
    )
    seen = detect.detect(np.stack([np.asarray(case.picture) for case in cases]))
    assert seen.scenes() == [case.scene for case in cases]


def test_who_sees_all_is_right_about_all(cases):
    found = reading.measure(teacher(), cases, "test")
    assert found["inventory"][:2] == (COUNT, COUNT)
    things = sum(len(case.scene.things) for case in cases)
    assert found["things"]["recall"][:2] == found["things"]["precision"][:2] == (things, things)
    assert all(rate.value == 1 for rate in found["wrong"].values())
    kinds = {kind for case in cases for kind in case.faults}
    assert kinds == set(found["faults"]) and found["unreadable"] == {"inventory": 0, "critique": 0}


def test_what_cannot_be_understood_is_counted_and_never_right(cases):
    found = reading.measure(Dozing(teacher()), cases, "test")
    assert found["unreadable"] == {"inventory": COUNT // 3, "critique": COUNT // 3}
    assert found["inventory"][:2] == (COUNT - COUNT // 3, COUNT)
    assert found["things"]["precision"].value == 1 > found["things"]["recall"].value
    wrong = found["wrong"]
    assert wrong["accuracy"][:2] == (COUNT - COUNT // 3, COUNT)
    assert wrong["precision"].value == 1 > wrong["recall"].value
    assert wrong["recall"].trials == sum(bool(case.faults) for case in cases)


def test_unclear_pictures_have_no_inventory_but_are_wrong(cases, asked):
    pictures = np.stack([np.asarray(case.picture) for case in cases])
    readings = certain(np.stack([case.scene.codes() for case in cases]))
    readings.clean[:3] = False
    verdicts = [scores.judge(prompt.goal, readings, i) for i, prompt in enumerate(asked)]
    seen = reading.of_drawn(pictures, readings, asked, verdicts)
    assert [case.scene is None for case in seen] == [True] * 3 + [False] * (COUNT - 3)
    assert all("unclear" in case.faults for case in seen[:3])
    found = reading.measure(teacher(), seen, "test")
    assert found["inventory"][:2] == (COUNT - 3, COUNT - 3)
    assert found["faults"]["unclear"]["recall"][:2] == (0, 3)


def test_tables_and_page_show_it(cases):
    found = reading.measure(Dozing(teacher()), cases, "test")
    section = page._reading({"renders": found, "drawn": found})
    assert [table.title for table in section.tables[1:2]] == ["Faults in renders"]
    assert f"{COUNT // 3} inventories" in section.tables[0].note
    rows = view.detection_rows(found)
    assert [name for name, _ in rows] == ["anything wrong", *found["faults"]]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(
        view._table("reading", ("inventory", *view.THINGS), [("", view.inventory_rates(found))])
    )
    assert f"{found['inventory'].value:.1%}" in console.export_text()
    console.print(view._table("x", ("precision",), [("never said", [rate_of(0, 0)])]))
    assert "none" in (text := console.export_text()) and "nan" not in text


def test_the_model_that_ships_reads_pictures():
    few = {"a red circle": 1, "two blue stars and a green ring": 3, "five black squares": 5}
    shown = []
    for text, count in few.items():
        scene = layout(parse_prompt(text), np.random.default_rng(count))
        assert len(scene.things) == count
        shown.append(picture_of(scene, np.random.default_rng(count)))
    weights = build_vlm.find("miniature-vlm")
    assert weights.variant == "miniature"
    vlm = build_vlm.load_vlm(weights, dtype="float32", context=512)
    try:
        for picture, pixels in zip(shown, rendered(shown, len(shown)), strict=True):
            asked = requests.INVENTORY.message(Image.fromarray(pixels))
            text = vlm.start().ask([asked], Options(max_tokens=128, temperature=0.0)).text
            assert read_inventory(text) == from_codes(picture.codes)
    finally:
        vlm.close()
