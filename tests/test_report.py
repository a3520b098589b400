"""Pages: whole in one file, escaped, with the numbers they are given."""

import base64
import io
import re

import jinja2
import numpy as np
import pytest
from PIL import Image

from clvr_jax.report.evaluation import Card, Gallery, Section, Table, Tile, evaluation_page
from clvr_jax.report.page import page, png_uri
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
