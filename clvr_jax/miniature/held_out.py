"""Which split a prompt, an edit or a scene belongs to, by construction.

Some colour-shape pairs and some (shape, relation, shape) combinations are in nothing that is
trained on, developed on or tested on: not in prompts, not in edits, not even by chance in scenes.
Held-out prompts each ask for at least one of them. Of what remains, a hash decides.
"""

import enum
import hashlib
from typing import TYPE_CHECKING

from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.places import OPPOSITE, SO_TO
from clvr_jax.miniature.scene import CELLS, COLOURS, SHAPES, Scene, Thing

if TYPE_CHECKING:
    from clvr_jax.miniature.edits import Edit


class Split(enum.Enum):
    """Train; dev for tuning; test for reporting; held_out for combinations never trained."""

    TRAIN = "train"
    DEV = "dev"
    TEST = "test"
    HELD_OUT = "held_out"


# one for each shape, each of another colour
PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "cyan"),
        ("triangle", "orange"),
        ("star", "green"),
        ("ring", "red"),
        ("cross", "yellow"),
    }
)
# (shape, relation, shape); and the same said the other way round, see `is_held`
COMBINATIONS = (
    ("star", "above", "ring"),
    ("cross", "above", "square"),
    ("circle", "left of", "triangle"),
    ("square", "left of", "star"),
)
COLOURS_OF = {s: tuple(c for c in COLOURS if (s, c) not in PAIRS) for s in SHAPES}  # trained ones
SHAPES_OF = {c: tuple(s for s in SHAPES if (s, c) not in PAIRS) for c in COLOURS}
_TEST, _DEV = 0.10, 0.10  # shares of goals


def _bans() -> dict[str, tuple[tuple[tuple[str, frozenset[int]], ...], ...]]:
    """For a shape and its cell: where another shape must not be, as (shape, cells)."""
    bans = {shape: [[] for _ in range(CELLS)] for shape in SHAPES}
    for first, word, second in COMBINATIONS:
        for cell in range(CELLS):
            bans[first][cell].append((second, SO_TO[OPPOSITE[word]][cell]))
            bans[second][cell].append((first, SO_TO[word][cell]))
    return {shape: tuple(tuple(entry) for entry in rows) for shape, rows in bans.items()}


BANS = _bans()


def is_held(first: str | None, word: str, second: str | None) -> bool:
    """Say if a relation between two shapes is held out, whichever way round it is said."""
    either = (first, word, second), (second, OPPOSITE[word], first)
    return any(combination in COMBINATIONS for combination in either)


def taints(thing: Thing, others: tuple[Thing, ...]) -> bool:
    """Say if a thing is of a held-out pair or in a held-out relation to one of the others."""
    if (thing.shape, thing.colour) in PAIRS:
        return True
    bans = BANS[thing.shape][thing.cell]
    return any(o.shape == shape and o.cell in cells for shape, cells in bans for o in others)


def is_clean(scene: Scene) -> bool:
    """Say if nothing in the scene is held out."""
    return not any(taints(thing, scene.things) for thing in scene.things)


def asks_held(goal: Goal) -> bool:
    """Say if the goal names a held-out combination."""
    groups = goal.groups
    return any((g.shape, g.colour) in PAIRS for g in groups) or any(
        is_held(groups[r.first].shape, r.word, groups[r.second].shape) for r in goal.relations
    )


def edits_held(edit: "Edit") -> bool:
    """Say if the words of an edit name a held-out combination."""
    new, old = edit.becomes, edit.thing
    kept = old.shape if old and edit.kind != "replace" else None
    ends = [new._replace(shape=new.shape or kept), *([old] if old else [])]
    related = [end for end in ends if end.other]
    named = [*ends, *(end.other for end in related)]
    return any((name.shape, name.colour) in PAIRS for name in named) or any(
        is_held(end.shape, end.word, end.other.shape) for end in related
    )


def is_common(goal: Goal) -> bool:
    """Say if a goal is of the few that all splits share; then the text decides its split.

    These are one thing without a place ("a small red circle"), things alike of which nothing but
    the shape is said ("three stars"), and two things of which no more is said ("a circle and a
    star"): about two hundred goals.
    """
    groups = goal.groups
    bare = all(g.colour is None and g.size is None and g.place is None for g in groups)
    if len(groups) == 1:
        return bare or (groups[0].count == 1 and groups[0].place is None)
    return len(groups) == 2 and goal.count == 2 and bare and not goal.relations


def split_of(goal: Goal, text: str = "") -> Split:
    """Return the split of a prompt; the text matters only where `is_common`."""
    if asks_held(goal):
        return Split.HELD_OUT
    return split_of_key(f"{goal.key()} {plain(text)}" if is_common(goal) else goal.key())


def plain(text: str) -> str:
    """Return a text in lower case without its last full stop: what tells one from another."""
    return text.lower().rstrip(".")


def split_of_key(key: str) -> Split:
    """Return train, dev or test by a stable hash of a text."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < _TEST:
        return Split.TEST
    return Split.DEV if share < _TEST + _DEV else Split.TRAIN
