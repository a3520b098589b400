"""Reading is the inverse of writing, reads a little more, and says what it cannot read."""

import numpy as np
import pytest

from clvr_jax.miniature import edits, phrases, prompts, scenes
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.references import Description


def inverse(count: int) -> set[str]:
    """Write and read back prompts, descriptions and edits; return the words seen."""
    rng = np.random.default_rng(20)
    words = set()
    for i in range(count):
        split = Split.HELD_OUT if i % 4 == 3 else Split.TRAIN
        prompt, scene = prompts.sample(rng, None, split)
        if i % 5 == 0:
            prompt = prompts.describe(scene, rng, (0.0, 0.5, 1.0)[i % 3], relations=i % 3)
        assert parse_prompt(prompt.text).key() == prompt.goal.key(), prompt
        edit, text, _ = edits.sample(rng, scenes.sample(rng, Split.TRAIN))
        assert parse_edit(text) == edit, text
        pair, pair_text, _, _ = edits.sample_pair(rng) if i % 4 == 0 else (edit, text, None, None)
        assert parse_edit(pair_text) == pair, pair_text
        words |= {*phrases.tokenize(f"{prompt.text} {text} {pair_text}")}
    return words


def test_reading_is_the_inverse_of_writing():
    inverse(80)  # prompts, as many edits, some pairs


@pytest.mark.slow
def test_reading_is_the_inverse_of_many():
    words = inverse(20_000) - {",", "."}
    assert words <= phrases.VOCABULARY and 125 <= len(words) <= 150


def test_prompts_of_users():
    star, ring = Group(1, "star"), Group(1, "ring")
    left = (Relation(0, "left of", 1),)
    for text, goal in {
        "A red circle, a blue square, and 3 stars!": Goal(
            (Group(1, "circle", "red"), Group(1, "square", "blue"), Group(3, "star"))
        ),
        "a star left of a ring": Goal((star, ring), left),
        "a ring. a star. the ring is to the right of the star": Goal((star, ring), left),
        "a ring and a star to the left of it": Goal((star, ring), left),
        "In the center there is a tiny red star": Goal(
            (Group(1, "star", "red", "small", "middle"),)
        ),
        "in the top row there are two stars and a ring": Goal(
            (Group(2, "star", place="top row"), Group(1, "ring", place="top row"))
        ),
        "in the top row there are two stars. a ring": Goal(
            (Group(2, "star", place="top row"), ring)
        ),
        "a star and a ring. the ring is in the top left corner.": Goal(
            (star, Group(1, "ring", place="top left corner"))
        ),
        "please draw me a picture of eight things": Goal((Group(8),)),
        "in the top row, there is a red star": Goal((Group(1, "star", "red", place="top row"),)),
        # what is said behind a thing is said of it, not of what came before
        "a star above a ring above a cross": Goal(
            (star, ring, Group(1, "cross")), (Relation(0, "above", 1), Relation(1, "above", 2))
        ),
        "a star above a ring in the middle": Goal(
            (star, Group(1, "ring", place="middle")), (Relation(0, "above", 1),)
        ),
        "a star in the middle above a ring": Goal(
            (Group(1, "star", place="middle"), ring), (Relation(0, "above", 1),)
        ),
        "an empty picture": Goal(()),
    }.items():
        assert parse_prompt(text).key() == goal.key(), text


def test_edits_of_users():
    star, ring = Description("star"), Description("ring")
    above = Description(word="above", other=ring)
    for text, edit in {
        "Please make the star blue.": Edit("recolour", star, Description(colour="blue")),
        "move the star above the ring": Edit("move", star, above),
        "put the star above the ring": Edit("move", star, above),
        "put a star above the ring": Edit("add", None, above._replace(shape="star")),
        "move the star above the ring to the top row": Edit(
            "move", above._replace(shape="star"), Description(place="top row")
        ),
        "move the star in the top row over the ring": Edit(
            "move", Description("star", place="top row"), above
        ),
        "make the star above the ring small": Edit(
            "resize", above._replace(shape="star"), Description(size="small")
        ),
        "make the star a ring": Edit("replace", star, ring),
        "add a cross above the ring in the middle": Edit(
            "add",
            None,
            above._replace(shape="cross", other=ring._replace(place="middle")),
        ),
        "move the star above the ring in the middle to the top row": Edit(
            "move",
            Description("star", word="above", other=ring._replace(place="middle")),
            Description(place="top row"),
        ),
        "copy the star in the top row from image 1 to the middle of image 2": Edit(
            "bring", Description("star", place="top row"), Description(place="middle")
        ),
    }.items():
        assert parse_edit(text) == edit, text


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "a red dog on a skateboard",
            "unknown words in the prompt: dog, skateboard.*circle.*purple",
        ),
        ("five stars and four rings", "at most 8 things, this asks for 9"),
        ("a red star and a blue star. the star is above a ring", '"the star" means several things'),
        ("a ring. the star is above the ring", '"the star" means nothing'),
        ("a star in the top row in the middle", "one place for each"),
        ("two stars above a ring", "between single things"),
        ("a star. the star is above the star", "above itself"),
        ("draw", "cannot read the prompt"),
        ("", "cannot read the prompt"),
        ("a star a", 'from "a" on'),
        ("a ring. a small large star", 'from "a small large star" on'),
        ("a red small blue star", 'from "a red small blue star" on'),
    ],
)
def test_prompts_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("make the dog blue", "unknown words in the edit: dog.*Shapes"),
        ("add two stars", "cannot read the edit"),
        ("remove the star and the ring", "cannot read the edit"),
        ("move the star", "cannot read the edit"),
    ],
)
def test_edits_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_edit(text)
