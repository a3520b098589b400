"""Edits in words."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clvr_jax.data.turns import MARKER, Action, marker
from clvr_jax.miniature import words
from clvr_jax.miniature.chance import pick
from clvr_jax.miniature.references import say, say_where

if TYPE_CHECKING:
    from clvr_jax.miniature.edits import Edit

# {thing} "the star", {kind} "a red ring", {new} the same with where it is to be, {where} "in the
# top row" or "above the ring", {to} "to the top row" or the same, {colour} and {size} words, {more}
# "larger", {grow} "enlarge", {of} "from", {there} where in image 2. `parse` reads the same table.
TEMPLATES = {
    "add": ("add {new}", "put {new}", "draw {new}", "place {new}", "insert {new}", "paint {new}"),
    "remove": (
        "remove {thing}",
        "delete {thing}",
        "erase {thing}",
        "take away {thing}",
        "take {thing} away",
        "take out {thing}",
    ),
    "recolour": (
        "make {thing} {colour}",
        "paint {thing} {colour}",
        "colour {thing} {colour}",
        "turn {thing} {colour}",
        "change {thing} to {colour}",
        "change the colour of {thing} to {colour}",
    ),
    "resize": (
        "make {thing} {more}",
        "make {thing} {size}",
        "change {thing} to {size}",
        "change the size of {thing} to {size}",
        "{grow} {thing}",
    ),
    "replace": (
        "replace {thing} with {kind}",
        "replace {thing} by {kind}",
        "swap {thing} for {kind}",
        "change {thing} into {kind}",
        "turn {thing} into {kind}",
        "exchange {thing} for {kind}",
    ),
    "move": (
        "move {thing} {to}",
        "shift {thing} {to}",
        "bring {thing} {to}",
        "move {thing} so that it is {where}",
        "shift {thing} so that it is {where}",
    ),
    "bring": (
        "take {thing} {of} image 1 and put it {there}",
        "take {thing} {of} image 1 and place it {there}",
        "take {thing} {of} image 1 and add it {there}",
        "add {thing} {of} image 1 {there}",
        "copy {thing} {of} image 1 {there}",
        "bring {thing} {of} image 1 {there}",
        "put {thing} {of} image 1 {there}",
    ),
}
COMPARATIVES = {"small": ("smaller",), "large": ("larger", "bigger")}
GROW = {"small": ("shrink",), "large": ("enlarge",)}
OF_IMAGE = ("of", "from", "in")
INTO_IMAGE = ("into", "to", "in")
_IMAGE = re.compile(r"image (\d)")  # what edits call a reference, by its place


def write(edit: "Edit", rng: np.random.Generator) -> str:
    """Return an instruction for an edit, e.g. "move the star above the ring".

    A place to move to always comes with "to" or "into": "in" could be where the thing is now. Two
    relations in a row, or one and the place of its other thing, could be read in two ways: "so that
    it is" parts them.
    """
    new, templates = edit.becomes, TEMPLATES[edit.kind]
    if edit.kind == "move" and new.word and (edit.thing.word or new.other.place):
        templates = templates[-2:]
    template = pick(rng, templates)
    saying = {
        "thing": lambda: say(rng, edit.thing),
        "kind": lambda: say(rng, new, "a"),
        "new": lambda: say(rng, new, "a"),
        "where": lambda: say_where(rng, new),
        "to": lambda: say_where(rng, new, to=True),
        "there": lambda: _in_image_2(rng, edit),
        "of": lambda: words.vary(rng, OF_IMAGE),
        "colour": lambda: new.colour,
        "size": lambda: words.vary(rng, words.SIZE_WORDS[new.size]),
        "more": lambda: pick(rng, COMPARATIVES[new.size]),
        "grow": lambda: pick(rng, GROW[new.size]),
    }
    parts = [p if p[0] != "{" else saying[p[1:-1]]() for p in template.split()]
    please = ["please"] if rng.random() < 0.08 else []
    return words.finish(rng, [" ".join(please + parts)])


def by_place(action: Action) -> str:
    """Return an action's prompt with its references called by their places, "image 1"."""
    return MARKER.sub(lambda m: f"image {action.references.index(int(m[1])) + 1}", action.prompt)


def by_number(text: str, references: Sequence[int]) -> str:
    """Return an edit's words with its references, "image 1", called by their numbers.

    Args:
      text: of `write`.
      references: numbers of the pictures, in the order of their places.
    """
    return _IMAGE.sub(lambda m: marker(references[int(m[1]) - 1]), text)


def _in_image_2(rng: np.random.Generator, edit: "Edit") -> str:
    new = edit.becomes
    if new.place:
        return f"{say_where(rng, new, to=True)} of image 2"
    if new.word:
        return f"{say_where(rng, new)} {words.vary(rng, OF_IMAGE)} image 2"
    return f"{pick(rng, INTO_IMAGE)} image 2"
