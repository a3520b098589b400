"""`python -m launch.evaluate miniature`: with a painter by rules, and the whole command."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clvr_jax.miniature import detect_eval, parse, scores, splits
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.prompts import KINDS
from clvr_jax.miniature.readings import read
from clvr_jax.miniature.scene import Scene, from_codes
from clvr_jax.miniature.teacher.layout import layout
from clvr_jax.statistics import rate
from launch import evaluate
from launch.evaluation import miniature, page, view
from launch.evaluation.sampling import Job, draw_all, groups
from tests import QUICK_COMPILE
from tests.miniature.perfect import renders

ROOT = Path(__file__).parents[2]


def paint(texts, references, seeds, text_tokens, spoil=lambda text, scene: scene):
    """Render what the texts ask for, reading references with a detector."""
    drawn = []
    for text, shown, seed in zip(texts, references, seeds):
        rng = np.random.default_rng(seed)
        if shown:
            *sources, before = detect_eval.detect(np.stack(shown)).scenes()
            scene = parse.parse_edit(text).apply(before, *sources, rng=rng)
        else:
            scene = layout(parse.parse_prompt(text), rng)
        drawn.append(spoil(text, scene).codes())
    return renders(np.stack(drawn), seeds)


BUCKETS = (32, 48, 256)


def parts(draw):
    tokens = lambda texts: [len(text) // 2 for text in texts]
    return miniature.Parts(draw, tokens, bucket, np.array, BUCKETS)


def bucket(tokens):
    return next(length for length in BUCKETS if tokens <= length)


ABOUT = {
    "benchmark": "miniature",
    "settings": {"weights": "mine", "split": "dev", "steps": 28, "guidance": 4.0, "seed": 0},
    "weights": {
        "path": "somewhere",
        "kind": "painter",
        "fingerprints": {"transformer": "abc"},
        "text_lengths": [32, 48, 256],
    },
    "environment": {
        "command": "python -m launch.evaluate <miniature>",
        "date": "today",
        "commit": None,
        "devices": 1,
        "device": "cpu",
        "processor": "some",
        "cores": 2,
        "versions": {"jax": "0"},
    },
}


@pytest.fixture(scope="module")
def evaluations():
    """By a painter that is always right, and by one that leaves a thing out of crowded scenes."""

    def forget(text, scene):
        return Scene(scene.things[1:]) if len(scene.things) > 4 else scene

    found = {}
    for kind in KINDS:  # the first of the fixed list: all 600 take seconds
        splits.extend(found, Split.DEV, kind, 3)
    plan = miniature.Plan(Split.DEV, count=2, edits=2, renders=6, batch=16)
    wrong = lambda *batch: paint(*batch, spoil=forget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "prompts", lambda split: tuple(found.values()))
        return [miniature.evaluate(parts(draw), plan) for draw in (paint, wrong)]


def test_a_perfect_painter_passes_everything(evaluations):
    right = evaluations[0]
    report = right.prompts.report
    assert report["overall"][:2] == (24, 24)
    assert {name: kind.trials for name, kind in report["kinds"].items()} == dict.fromkeys(
        (item["kind"] for item in report["items"]), 2
    )
    assert report["agreement"]["verdicts"] == 1.0 == report["agreement"]["pictures"]
    edits = right.edits.report
    assert list(edits["kinds"]) == list(scores.EDITS)
    for rates in (*edits["kinds"].values(), *edits["references"].values()):
        assert all(each.value == 1.0 for each in rates.values())
    assert edits["references"]["2"]["passed"].trials == 2
    assert right.ceiling.report["recoded"]["reward"][:2] == (6, 6)
    assert right.ceiling.report["mean_error_levels"] == 0


def test_what_a_forgetful_painter_leaves_out_is_missing(evaluations):
    report = evaluations[1].prompts.report
    for item in report["items"]:
        asked = parse.parse_prompt(item["prompt"]).count
        assert item["passed"] == (asked <= 4)
        found = [kind for kind, _ in item["faults"]]
        assert found.count("missing") == (asked > 4)
    assert report["kinds"]["mix8"].passed == 0 and report["kinds"]["single"].value == 1.0
    edits = evaluations[1].edits
    for case, verdict in zip(edits.asked, edits.verdicts):
        assert verdict.passed == (len(case.after.things) <= 4)


def test_results_are_json_and_the_page_needs_nothing_else(evaluations, tmp_path):
    view.write(tmp_path / "results.json", ABOUT, evaluations[1])
    results = json.loads((tmp_path / "results.json").read_text())
    overall = results["prompts"]["overall"]
    assert overall["rate"] == overall["passed"] / 24 and overall["low"] < overall["rate"]
    assert results["edits"]["kinds"]["bring"]["kept"]["trials"] == 2
    assert len(results["prompts"]["items"][0]["codes"]) == 16

    page.write(tmp_path / "index.html", ABOUT, evaluations[1])
    html = (tmp_path / "index.html").read_text()
    shown = 24 + sum(len(case.shown) + 1 for case in evaluations[1].edits.asked) + 12
    assert html.count('src="data:image/png;base64,') == shown == html.count("<img ")
    assert not re.search(r"""(src|href)=["'](?!data:)|<script|<link|url\(""", html)
    assert "mine: 28 steps, guidance 4, seed 0" in html, "as it was named, not where it lies"
    assert "&lt;miniature&gt;" in html and "missing: " in html
    assert html.count('class="card passed"') + html.count('class="card failed"') == 24 + 14 + 6
    text = Console(width=100, record=True, file=io.StringIO())
    view.show(evaluations[1], text)
    assert "with 2 references" in text.export_text()


def test_groups_are_few_and_each_text_has_its_smallest_length():
    picture = np.zeros((4, 4, 3), np.uint8)
    jobs = [Job(str(i), i, (picture,) * (i % 2)) for i in range(11)]
    tokens = [20, 20, 40, 32, 33, 20, 90, 20, 20, 20, 20]
    found = groups(jobs, tokens, bucket, 3)
    assert sorted(int(i) for group in found for i in group.jobs) == list(range(11))
    for group in found:
        for i in group.jobs:
            assert len(jobs[i].references) == group.references
            assert bucket(tokens[i]) == group.text_tokens
    # five edits: batches of three and two, not of three, two and a third shape
    assert [(g.references, g.text_tokens, g.batch, len(g.jobs)) for g in found] == [
        (0, 32, 3, 3),
        (0, 48, 2, 2),
        (0, 256, 1, 1),
        (1, 32, 3, 5),
    ]
    sizes = set()

    def draw(texts, references, seeds, text_tokens):
        sizes.add((len(references[0]), text_tokens, len(texts)))
        return np.stack([np.full((4, 4, 3), int(text), np.uint8) for text in texts])

    pictures, speed = draw_all(draw, jobs, found, "jobs")
    assert pictures[:, 0, 0, 0].tolist() == list(range(11))
    assert len(sizes) == 4 and sum(group["pictures"] for group in speed) == 11


def test_a_plan_refuses_what_is_none():
    with pytest.raises(ValueError, match="must not be negative"):
        miniature.Plan(Split.DEV, count=-1)


def test_results_are_not_replaced_unasked(tmp_path, capsys):
    evaluate.check_out(tmp_path / "new", False)
    evaluate.check_out(tmp_path, False)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds results.json; choose another --out"):
        evaluate.check_out(tmp_path, False)
    evaluate.check_out(tmp_path, True)
    with pytest.raises(FileExistsError, match="is a file"):
        evaluate.check_out(tmp_path / "results.json", True)
    with pytest.raises(SystemExit):
        evaluate.main(["miniature", "--weights=x", f"--out={tmp_path}"])
    assert "give --overwrite" in capsys.readouterr().err


def test_an_unclear_picture_is_shown_as_such():
    code = np.zeros((1, 16), int)
    code[0, 3] = 5
    verdict = scores.judge(
        parse.parse_prompt("a circle"), read(code, np.full((1, 16), 0.1), np.array([False])), 0
    )
    assert verdict.faults[0] == ("unclear", "unclear in 16 places")
    assert rate([verdict.passed]).value == 0 and from_codes(code[0]).things


@pytest.mark.slow
def test_the_command_with_random_weights(tmp_path):
    flags = ["--split=dev", "--count=2", "--edits=2", "--renders=8", "--steps=2"]
    begin = [sys.executable, "-m", "launch.miniature", f"--out={tmp_path}", "--stages=begin"]
    command = [sys.executable, "-m", "launch.evaluate", "miniature", *flags]
    command += [f"--weights={tmp_path / 'begin'}", f"--out={tmp_path / 'out'}"]
    environment = os.environ | {"XLA_FLAGS": QUICK_COMPILE}
    for each in (begin, command):
        done = subprocess.run(each, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(tmp_path / "out" / "index.html"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(evaluate.FILES)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"]["overall"]["trials"] == 24
    assert results["prompts"]["overall"]["passed"] == 0  # the weights are random
    assert set(results["weights"]["fingerprints"]) == {"transformer", "vae", "text_encoder"}
    assert results["vae"]["renders"]["evaluation"]["rate"] == 1.0
    assert results["environment"]["command"].startswith("python -m launch.evaluate miniature")
