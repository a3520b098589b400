"""Pages: whole in one file, escaped, with the numbers they are given."""

import base64
import io
import re

import jinja2
import numpy as np
import pytest
from PIL import Image

from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.report.chart import HEIGHT, WIDTH, Chart, Curve
from clvr_jax.report.evaluation import Card, Gallery, Section, Table, Tile, evaluation_page
from clvr_jax.report.page import page, png_uri
from clvr_jax.report.trajectory import Entry, Spent, index_page, trajectory_page
from clvr_jax.statistics import rate

RED = png_uri(np.full((4, 6, 3), (255, 0, 0), np.uint8))
RATE = rate([True] * 3 + [False])


def written(sections=()):
    return evaluation_page(
        "Shapes & <more>", "of some", [Tile("passed", "75 %")], sections, [("device", "cpu")]
    )


def test_a_picture_survives_its_uri():
    head, data = RED.split(",")
    assert head == "data:image/png;base64"
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert back.shape == (4, 6, 3) and (back == (255, 0, 0)).all()


def test_the_page_needs_no_other_file_and_escapes_text():
    html = written()
    assert "<h1>Shapes &amp; &lt;more&gt;</h1>" in html and "<more>" not in html
    assert not re.search(r"""(src|href)=["'](?!data:)|<script|<link|url\(|@import""", html)
    assert "prefers-color-scheme: dark" in html
    assert "<dt>device</dt><dd>cpu</dd>" in html


def test_a_rate_is_drawn_to_scale_with_its_interval():
    html = written([Section("Tasks", "", [Table("By task", ("task", "passed"), [("one", RATE)])])])
    assert 'width="75.00"' in html and "75.0 %" in html
    low, high = 100 * RATE.low, 100 * RATE.high
    assert f'x1="{low:.2f}" x2="{high:.2f}"' in html and f"{low:.1f} – {high:.1f}" in html
    empty = Table("By task", ("task", "passed"), [("one", rate([]))])
    assert ">none<" in written([Section("Tasks", "", [empty])])


def test_a_chart_is_to_scale_and_its_names_lie_apart():
    rates = [rate([True] * n + [False] * (10 - n)) for n in (2, 4, 8)]
    curve = Curve("loop <a>", [(28.0, rates[0]), (56.0, rates[1]), (112.0, rates[2])])
    chart = Chart("Passed", "evaluations", [curve, Curve("best", [(110.0, rates[2])])])
    drawn = chart.drawing()
    first, second, third = drawn["curves"][0]["dots"]
    assert second["x"] - drawn["x0"] == pytest.approx(2 * (first["x"] - drawn["x0"]))
    assert first["y"] - third["y"] == pytest.approx(3 * (first["y"] - second["y"]))
    assert third["high"] < third["y"] < third["low"] and third["x"] < drawn["x1"]
    names = [curve["label"] for curve in drawn["curves"]]
    assert abs(names[0]["y"] - names[1]["y"]) >= 12
    assert [label for _, label in drawn["right"]] == ["0", "20", "40", "60", "80", "100"]
    assert [label for _, label in drawn["up"]] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    html = written([Section("Ways", "", charts=[chart])])
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in html and "loop &lt;a&gt;" in html
    assert html.count("<polyline") == 1 and html.count("<circle") == 4
    low = [Curve(f"way {n}", [(100.0, rate([False] * 9))]) for n in range(4)]
    ups = sorted(curve["label"]["y"] for curve in Chart("Passed", "x", low).drawing()["curves"])
    assert ups[-1] <= drawn["y0"] and min(np.diff(ups)) >= 12, "in a stack upwards"
    wide = Chart("Passed", "x", [Curve("a way of a long name", [(100.0, RATE)])]).drawing()
    assert wide["curves"][0]["label"]["anchor"] == "end"
    nothing = Chart("Passed", "tokens", [Curve("one", [(0.0, RATE)])]).drawing()
    assert nothing["curves"][0]["dots"][0]["x"] == nothing["x0"]
    with pytest.raises(ValueError, match="needs costs from zero on"):
        Chart("Passed", "tokens", []).drawing()


def test_cards_say_how_they_ended_in_words_too():
    cards = [
        Card("a <circle>", True, (("", RED),)),
        Card("a star", False, (("before", RED), ("after", RED)), ("missing: star",), "no. 7"),
    ]
    html = written([Section("Tasks", "", (), [Gallery("single", RATE, cards)])])
    assert html.count("<img ") == 3 and "a &lt;circle&gt;" in html
    assert html.index('class="card passed"') < html.index('class="card failed"')
    assert "<li>missing: star</li>" in html and "no. 7" in html and "3 of 4 passed" in html
    assert written([Section("Tasks", "", (), [Gallery("none", rate([]), [])])])


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        page("base.html.jinja", facts=[])


STEPS = (
    Step(
        reasoning="I begin with <b>one</b>.",
        action=Action(kind="generate", prompt="a red circle"),
        image="1.png",
        verdict="accepted",
        metadata={"think_s": 0.25, "draw_s": 1.5, "tokens": 12, "evaluations": 4},
    ),
    Step(
        reasoning="<IMG_GEN_1> lacks its star.",
        action=Action(kind="edit", prompt="add a star to <IMG_GEN_1>", references=(1,)),
        image="2.png",
        verdict="rejected",
        metadata={"retries": ["Overloaded: busy"]},
    ),
)
DRAWN = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
SPENT = Spent(2, 8, 24, 3.21)


def shown(**fields):
    given = dict(id="x", goal="a circle & a star", steps=STEPS, outcome="stopped", final=1)
    return trajectory_page(Trajectory(**given | fields), DRAWN, SPENT, {"device": "cpu"})


def test_a_trajectory_is_told_step_by_step():
    html = shown(closing="The star is right.")
    assert "<h1>a circle &amp; a star</h1>" in html and "&lt;b&gt;one" in html
    assert not re.search(r"""(src|href)=["'](?!data:)|<script|<link|url\(|@import""", html)
    one, two = (png_uri(picture) for picture in DRAWN)
    # the answer above; in its step; and beside the edit that works from it
    assert html.count(one) == 3 and html.count(two) == 1
    assert "0.2 s thinking, 1.5 s drawing, 12 tokens, 4 evaluations" in html
    assert "picture 1 lacks its star." in html and "<IMG_GEN" not in html
    assert "tried again: Overloaded: busy" in html and "The star is right." in html
    assert html.count('class="final"') == 1 and "accepted · the answer" in html
    assert "the model was satisfied" in html and "<b>24</b>tokens" in html


def test_the_last_turn_is_told_whether_it_stopped_or_had_no_budget():
    html = shown(closing="All is there.", metadata={"closing": {"tokens": 7, "retries": ["busy"]}})
    assert "7 tokens" in html and "tried again: busy" in html and "✓" in html
    action = {"kind": "edit", "prompt": "move the star", "references": [2]}
    left = {"reasoning": "The star of <IMG_GEN_2> is low.", "action": action, "think_s": 0.5}
    html = shown(outcome="generations", metadata={"unfinished": left})
    assert "The star of picture 2 is low." in html and "move the star" in html
    assert "(not drawn)" in html and "0.5 s thinking" in html and "✓" not in html


def test_pictures_that_are_shown_small_are_small():
    large = [Image.effect_noise((256, 256), 90).convert("RGB") for _ in range(2)]
    whole = trajectory_page(Trajectory(id="x", goal="y", steps=STEPS), large, SPENT, {})
    assert len(whole) < sum(len(png_uri(picture)) for picture in large) * 1.6 + 30_000


def test_a_failed_trajectory_says_why():
    html = shown(outcome="failed", metadata={"error": "Failed: <no> action"})
    assert "it failed" in html and "Failed: &lt;no&gt; action" in html
    with pytest.raises(ValueError):
        trajectory_page(Trajectory(id="x", goal="y", steps=STEPS), DRAWN[:1], SPENT, {})


def test_many_trajectories_are_filtered_by_their_ends():
    entries = [
        Entry("a <star>", "stopped", SPENT, "0000/index.html", RED),
        Entry("two", "generations", SPENT, "0001/index.html", RED),
        Entry("three", "failed", Spent(0, 0, 0, 0.0), "0002/index.html", None),
        Entry("four", "stopped", SPENT, "0003/index.html", RED),
    ]
    html = index_page("Four", entries, {})
    assert html.count('class="entry stopped"') == 2 and "stopped 2" in html and "all 4" in html
    assert "failed 1" in html and "seconds 0" not in html, "only ends that there are"
    assert 'href="0001/index.html"' in html and "a &lt;star&gt;" in html
    assert "<b>6</b>pictures" in html and html.count("<img ") == 3
