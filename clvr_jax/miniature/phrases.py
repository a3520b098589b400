"""Phrases read back: the inverse of `words` and `references`, on tokens.

A reader takes the tokens and where to start, and returns all its readings as (value, where it
ends), the longest first; none if the phrase is not there.
"""

import re
from collections.abc import Iterable

from clvr_jax.miniature import orders, sentences, words
from clvr_jax.miniature.references import Description
from clvr_jax.miniature.scene import COLOURS

Tokens = tuple[str, ...]
Table = dict[Tokens, object]

# what users say and `write` does not
_ALSO_PLACES = {
    "middle": ("center",),
    "top row": ("first row", "upper row"),
    "bottom row": ("last row", "fourth row", "lower row"),
    "leftmost column": ("left column", "first column"),
    "rightmost column": ("right column", "last column", "fourth column"),
    "top half": ("upper side", "top side"),
    "bottom half": ("lower side", "bottom side"),
}
_ALSO_OPENERS = ("a photo of", "a picture showing", "an image with", "generate")
_ARTICLES = {"a": 1, "an": 1}
_INTO = (("in", "the"), ("on", "the"), ("at", "the"), ("to", "the"), ("into", "the"))


def tokenize(text: str) -> Tokens:
    """Return words and numbers in lower case, commas and full stops."""
    return tuple(re.findall(r"[^\s,.;:!?\-\"()]+|[,.]", re.sub(r"[;:!?]", ".", text.lower())))


def _table(entries: Iterable[tuple[str, object]]) -> Table:
    """Phrases to what they mean; longer ones come first."""
    found = {tuple(phrase.split()): value for phrase, value in entries}
    return dict(sorted(found.items(), key=lambda entry: -len(entry[0])))


def _invert(forms: dict[str, tuple[str, ...]]) -> Table:
    return _table((phrase, value) for value, phrases in forms.items() for phrase in phrases)


COUNT = _table(
    [*_ARTICLES.items(), *((word, n) for n, word in enumerate(words.NUMBERS, 1))]
    + [(str(n), n) for n in range(1, len(words.NUMBERS) + 1)]
)
SIZE = _invert(words.SIZE_WORDS)
COLOUR = _table((colour, colour) for colour in COLOURS)
NOUN = _table(
    [(word, shape) for shape, many in words.PLURALS.items() for word in (shape, many)]
    + [(word, None) for one, many in words.ANYTHING.items() for word in (one, many)]
)
PLACE = _invert({p: forms + _ALSO_PLACES.get(p, ()) for p, forms in words.PLACE_WORDS.items()})
RELATION = _invert(words.RELATION_WORDS)
MORE = _invert(orders.COMPARATIVES)
GROW = _invert(orders.GROW)
IMAGE = {"of": _table((word, None) for word in orders.OF_IMAGE)}
OF = _table((word, None) for word in orders.OF_IMAGE)
OPENER = _table((phrase, None) for phrase in (*sentences.openers(), *_ALSO_OPENERS))
THERE = _table((verb, None) for verb in (*sentences.THERE, *sentences.ALSO, "is", "are"))
_TABLES = (COUNT, SIZE, COLOUR, NOUN, PLACE, RELATION, MORE, GROW, OF, OPENER, THERE)


def _vocabulary() -> frozenset[str]:
    literals = [
        sentences.EMPTY,
        "the and , . please image 2 it recolour color",
        *map(" ".join, _INTO),
    ]
    literals += [template for forms in orders.TEMPLATES.values() for template in forms]
    said = {token for phrase in literals for token in phrase.split() if token[0] != "{"}
    return frozenset(said.union(*(phrase for table in _TABLES for phrase in table)))


VOCABULARY = _vocabulary()


def literal(tokens: Tokens, at: int, *phrases: Tokens) -> list[tuple[Tokens, int]]:
    """Read one of some fixed phrases."""
    return [(p, at + len(p)) for p in phrases if tokens[at : at + len(p)] == p]


def entry(tokens: Tokens, at: int, table: Table) -> list[tuple[object, int]]:
    """Read a phrase of a table."""
    for length in range(max(map(len, table)), 0, -1):
        phrase = tokens[at : at + length]
        if len(phrase) == length and phrase in table:
            return [(table[phrase], at + length)]
    return []


def kind(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "small red star": size and colour in any order, none of them twice, and a noun."""
    said: dict[str, object] = {}
    tables = {"size": SIZE, "colour": COLOUR}
    while found := [(n, *r) for n, table in tables.items() for r in entry(tokens, at, table)]:
        name, value, after = found[0]
        if name in said:
            return []
        said[name], at = value, after
    read = entry(tokens, at, NOUN)
    return [(Description(shape, said.get("colour"), said.get("size")), end) for shape, end in read]


def counted(tokens: Tokens, at: int) -> list[tuple[tuple[int, Description], int]]:
    """Read "a red star" or "two small things"."""
    return [
        ((count, name), end)
        for count, after in entry(tokens, at, COUNT)
        for name, end in kind(tokens, after)
    ]


def the(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "the red star"."""
    return [read for _, after in literal(tokens, at, ("the",)) for read in kind(tokens, after)]


def place(tokens: Tokens, at: int) -> list[tuple[str, int]]:
    """Read "in the top row" or "to the top row"."""
    return [r for _, after in literal(tokens, at, *_INTO) for r in entry(tokens, after, PLACE)]


def where(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read a place or a relation to "the ...", as a description without a kind.

    The other thing may have its place behind it.
    """
    places = [(Description(place=name), end) for name, end in place(tokens, at)]
    relations = [
        (Description(word=word, other=other), end)
        for word, after in entry(tokens, at, RELATION)
        for name, behind in the(tokens, after)
        for other, end in _placed(tokens, name, behind)
    ]
    return relations or places


def _placed(tokens: Tokens, name: Description, at: int) -> list[tuple[Description, int]]:
    """Read on after a kind: with the place behind it, and without."""
    return [*((name._replace(place=p), end) for p, end in place(tokens, at)), (name, at)]


def somewhere(tokens: Tokens, name: Description, at: int) -> list[tuple[Description, int]]:
    """Read on after a kind: with the place or relation behind it, and without."""
    found = [
        (name._replace(place=w.place, word=w.word, other=w.other), end)
        for w, end in where(tokens, at)
    ]
    return [*found, (name, at)]


def reference(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "the red star", with the place or relation behind it, and without."""
    return [r for name, after in the(tokens, at) for r in somewhere(tokens, name, after)]


def new(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "a red star", with the place or relation behind it, and without."""
    return [r for name, after in one(tokens, at) for r in somewhere(tokens, name, after)]


def one(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "a red star"."""
    return [(name, end) for (count, name), end in counted(tokens, at) if count == 1]


def image_2(tokens: Tokens, at: int) -> list[tuple[Description, int]]:
    """Read "into image 2" or "to the top row of image 2"."""
    ends = [(w, image) for w, after in where(tokens, at) for image in _image(tokens, after)]
    return ends or [(Description(), image) for image in _image(tokens, at)]


def _image(tokens: Tokens, at: int) -> list[int]:
    before = {(word, "image", "2") for word in orders.OF_IMAGE + orders.INTO_IMAGE}
    return [end for _, end in literal(tokens, at, *before)]
