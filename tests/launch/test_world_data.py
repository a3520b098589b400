"""Data that the miniature's klein is fine-tuned on."""

import collections
import json

import numpy as np
import pytest

from clvr_jax.data.conditioning import Policy, condition
from clvr_jax.data.images import read_image
from clvr_jax.data.sources import open_source
from clvr_jax.data.validate import require_valid
from clvr_jax.miniature import detect_eval, splits
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.parse import parse_edit
from launch import world_data

INSTRUCTION = Policy(text="instruction", references="chosen", buckets=(32, 56, 144))


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    world_data.edits(file, 70, seed=3)  # more than are rendered at once
    require_valid(str(file))
    return file


def test_edits_are_what_their_pictures_show(edits):
    source, kinds = open_source(edits), collections.Counter()
    assert len(source) == 70
    for number, made in enumerate(source):
        given = condition(made, len(made.steps) - 1, INSTRUCTION)
        assert given.text == made.goal and given.references == tuple(range(len(made.steps) - 1))
        assert len(made.steps) == (3 if number % 8 == 0 else 2)
        assert [step.verdict for step in made.steps[:-1]] == ["rejected"] * len(given.references)
        assert splits.may_train(made.steps[-1].action)
        shown = np.stack([np.asarray(read_image(step.image)) for step in made.steps])
        read = detect_eval.detect(shown)
        assert read.clean.all()
        *sources, before, after = (read.scene(i) for i in range(len(shown)))
        edit = parse_edit(by_place(made.steps[-1].action))
        assert edit.satisfied(before, after, *sources)
        kinds[edit.kind] += 1
    assert len(kinds) == 7


def test_edits_depend_on_their_seed_alone(edits, tmp_path):
    world_data.edits(tmp_path / "edits.jsonl", 2, seed=3)
    lines = edits.read_text().splitlines()
    assert (tmp_path / "edits.jsonl").read_text().splitlines() == lines[:2]
    for file in (tmp_path / "edits").iterdir():
        assert file.read_bytes() == (edits.with_suffix("") / file.name).read_bytes()
    world_data.edits(tmp_path / "others.jsonl", 2, seed=4)
    assert json.loads((tmp_path / "others.jsonl").read_text().splitlines()[0])["goal"] not in (
        json.loads(line)["goal"] for line in lines
    )
