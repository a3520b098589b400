"""The words of the world: all phrases that prompts and edits are made of, for writing and reading.

Each table maps what is meant to the ways to say it, the usual one first.
"""

import numpy as np

from clvr_jax.miniature.places import COLUMN_NAMES, PLACES, ROW_NAMES, SPOTS
from clvr_jax.miniature.scene import SHAPES

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
ANYTHING = {"thing": "things", "shape": "shapes", "object": "objects"}  # where no shape is named
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def _place_words() -> dict[str, tuple[str, ...]]:
    words = {}
    for name in PLACES:
        other = name.replace("top", "upper").replace("bottom", "lower")
        if name in ("left half", "right half"):
            other = name.replace("half", "side")
        if name == "middle":
            other = "centre"
        one_way = name in (*ROW_NAMES, *COLUMN_NAMES, *SPOTS)
        words[name] = (name,) if one_way else (name, other)
    return words


PLACE_WORDS = _place_words()


def vary(rng: np.random.Generator, forms: tuple[str, ...]) -> str:
    """Return one way to say it, the usual one in six of ten cases or more."""
    return forms[0] if rng.random() < 0.6 else forms[int(rng.random() * len(forms))]


def place_phrase(rng: np.random.Generator, place: str, to: bool = False) -> str:
    """Return "in the top row", or with `to` "to the top row"."""
    noun = vary(rng, PLACE_WORDS[place])
    if to:
        return f"{vary(rng, ('to', 'into'))} the {noun}"
    return f"{'on' if noun.endswith('side') else 'in'} the {noun}"


def relation_phrase(rng: np.random.Generator, word: str) -> str:
    """Return "above" or "over"."""
    return vary(rng, RELATION_WORDS[word])


def kind_name(shape: str | None, colour: str | None, size: str | None) -> str:
    """Return "small red star" in the usual words, "thing" where no shape is said."""
    return " ".join(part for part in (size, colour, shape or "thing") if part)


def article(words: str) -> str:
    """Return "a star" for "star", "an orange star" for "orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def kind_words(
    rng: np.random.Generator,
    shape: str | None,
    colour: str | None,
    size: str | None,
    many: bool = False,
) -> str:
    """Return "small red stars": what is said of size and colour, and the noun."""
    if shape is None:
        noun = vary(rng, tuple(ANYTHING))
        noun = ANYTHING[noun] if many else noun
    else:
        noun = PLURALS[shape] if many else shape
    adjectives = [vary(rng, SIZE_WORDS[size])] if size else []
    return " ".join([*adjectives, colour, noun] if colour else [*adjectives, noun])


def noun_phrase(
    rng: np.random.Generator,
    count: int,
    shape: str | None,
    colour: str | None = None,
    size: str | None = None,
) -> str:
    """Return "a red star", "an orange ring", "two small things"."""
    words = kind_words(rng, shape, colour, size, many=count > 1)
    if count > 1 or rng.random() < 0.1:
        return f"{NUMBERS[count - 1]} {words}"
    return article(words)


def enumerate_words(items: list[str]) -> str:
    """Return "a, b and c" of one item or more."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def finish(rng: np.random.Generator, sentences: list[str]) -> str:
    """Return sentences as one text: mostly lower case, the last full stop is often left out."""
    if rng.random() < 0.25:
        sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    return ". ".join(sentences) + ("." if rng.random() < 0.4 else "")
