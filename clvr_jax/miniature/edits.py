"""Edits: one change to a picture, as data that can be applied and checked, and its words.

An edit names its thing by a description that means that thing alone in the scene it was made
for, and describes what is to become of it. What it does not say is free: any choice is right.
All else must stay as it is, cell by cell.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from clvr_jax.miniature import held_out, scenes
from clvr_jax.miniature.chance import pick
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.orders import write
from clvr_jax.miniature.references import Description, open_values, refer, somewhere
from clvr_jax.miniature.scene import COLOURS, MOST, SHAPES, SIZES, Scene, Thing

KINDS = ("add", "remove", "recolour", "replace", "move", "resize")
PAIR_KINDS = ("bring",)  # of two pictures
_TRIES = 200
_NOTHING = Description()


class Outcome(NamedTuple):
    """What an edit does to a scene: a thing goes, and a thing comes of any of these choices.

    Attributes:
      gone: the thing that goes or is changed, None if nothing.
      cells, shapes, colours, sizes: of the thing that comes, chosen independently; no cells if
        nothing comes.
    """

    gone: Thing | None
    cells: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def allows(self, thing: Thing) -> bool:
        """Say if the thing may come."""
        return all(value in values for value, values in zip(thing, self[1:]))


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change.

    Attributes:
      kind: of `KINDS` or `PAIR_KINDS` (bring: a thing of image 1, as it is there, comes into
        image 2).
      thing: which thing of the scene (of image 1 for bring); None for add.
      becomes: what is said of the result: kind and place of what is added, colour (recolour),
        size (resize), kind (replace), place or relation (move, bring).

    Raises:
      ValueError: the kind is unknown, or a thing is named just where none is wanted.
    """

    kind: str
    thing: Description | None = None
    becomes: Description = _NOTHING

    def __post_init__(self):
        if self.kind not in (*KINDS, *PAIR_KINDS):
            raise ValueError(
                f"no edits of kind {self.kind}, only {', '.join((*KINDS, *PAIR_KINDS))}"
            )
        if (self.thing is None) != (self.kind == "add"):
            raise ValueError(f"{self}: add takes no thing of the scene, all other edits take one")

    def outcome(self, before: Scene, source: Scene | None = None) -> Outcome:
        """Return what may become of a scene.

        Args:
          before: the scene to change; image 2 for bring.
          source: image 1 for bring.

        Raises:
          ValueError: the edit cannot be done: a description does not mean exactly one thing, no
            allowed cell is free, or nothing would change.
        """
        new = self.becomes
        gone = self.thing.find(before) if self.kind not in ("add", "bring") else None
        if self.kind == "remove":
            return Outcome(gone)
        if self.kind in ("add", "move", "bring"):
            cells = tuple(sorted(new.cells(before).intersection(before.free())))
            if self.kind == "add":
                outcome = Outcome(None, cells, *open_values(new))
            else:
                if self.kind == "bring" and source is None:
                    raise ValueError("bringing a thing needs its source, image 1")
                kept = gone or self.thing.find(source)
                outcome = Outcome(gone, cells, *((value,) for value in kept[1:]))
            if not cells or (gone is None and len(before.things) == MOST):
                raise ValueError(f"there is no room for {self} in {before}")
            if self.kind == "move" and gone.cell in new.cells(before):
                raise ValueError(f"it is there already: {self} in {before}")
            return outcome
        if self.kind == "replace":
            values = open_values(new)
        else:  # recolour, resize
            values = [(said or old,) for said, old in zip(new[:3], gone[1:])]
        outcome = Outcome(gone, (gone.cell,), *values)
        if new.fits(gone):
            raise ValueError(f"it is so already: {self} in {before}")
        return outcome

    def apply(
        self, before: Scene, source: Scene | None = None, rng: np.random.Generator | None = None
    ) -> Scene:
        """Return the scene after; see `outcome` for arguments and errors.

        What the edit leaves open is drawn with `rng`; without it, the first choice is taken. An
        open place is the first in `places.ORDER`, as in pictures drawn at once.
        """
        gone, cells, *choices = self.outcome(before, source)
        left = before.without(gone.cell) if gone else before
        if not cells:
            return left
        take = (lambda values: values[0]) if rng is None else (lambda values: pick(rng, values))
        return left.put(Thing(scenes.first(cells), *(take(values) for values in choices)))

    def satisfied(self, before: Scene, after: Scene, source: Scene | None = None) -> bool:
        """Say if `after` is a right result: the change made, everything else kept exactly."""
        outcome = self.outcome(before, source)
        kept = set(before.things) - {outcome.gone}
        come = set(after.things) - kept
        if not kept <= set(after.things):
            return False
        if not outcome.cells:
            return not come
        return len(come) == 1 and outcome.allows(come.pop())


def sample(
    rng: np.random.Generator,
    scene: Scene,
    kind: str | None = None,
    split: Split = Split.TRAIN,
) -> tuple[Edit, str, Scene]:
    """Return an edit of a scene, its words, and a scene after it, drawn among the right ones.

    Except in `Split.HELD_OUT` the scene must hold nothing held out, and neither does the result;
    scene and words together decide the split by a hash. A held-out edit adds, changes or takes
    away something held out.

    Raises:
      ValueError: there is no such edit of the scene (e.g. adding a ninth thing).
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"no edits of kind {kind}, only {', '.join(KINDS)}")
    things = len(scene.things)
    possible = [
        k for k in KINDS if kind in (None, k) and (things < MOST if k == "add" else things > 0)
    ]
    for _ in range(_TRIES if possible else 0):
        edit = _draw(rng, scene, pick(rng, possible))
        done = _try(rng, edit, scene, split)
        if done:
            return edit, *done
    raise ValueError(f"found no edit ({kind or 'any'}, {split.value}) of {scene}")


def sample_scene(
    rng: np.random.Generator, kind: str | None = None, split: Split = Split.TRAIN
) -> tuple[Edit, str, Scene, Scene]:
    """Return an edit of some scene, its words, and the scene before and after it.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"no edits of kind {kind}, only {', '.join(KINDS)}")
    while True:
        before = scenes.sample(rng, split)
        try:
            edit, text, after = sample(rng, before, kind, split)
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
        return edit, text, before, after


def sample_pair(
    rng: np.random.Generator, split: Split = Split.TRAIN
) -> tuple[Edit, str, list[Scene], Scene]:
    """Return an edit of two pictures, its words, [image 1, image 2], and image 2 after it."""
    while True:
        source = scenes.sample(rng, split)
        before = scenes.sample(rng, split, int(rng.integers(1, MOST)))
        name = refer(rng, source, pick(rng, source.things))
        where = somewhere(rng, before) if rng.random() < 0.7 else _NOTHING
        edit = Edit("bring", name, where)
        done = _try(rng, edit, before, split, source)
        if done:
            return edit, done[0], [source, before], done[1]


def _try(rng, edit: Edit, before: Scene, split: Split, source: Scene | None = None):
    """Return (text, after) of an edit if it can be done and is of the split, else None."""
    try:
        after = edit.apply(before, source, rng)
    except ValueError:
        return None
    changed = set(before.things) ^ set(after.things)
    held = any(held_out.taints(t, (after if t in after.things else before).things) for t in changed)
    if held != (split is Split.HELD_OUT):
        return None
    text = write(edit, rng)
    if not held:
        key = f"{before.codes().tobytes().hex()} {held_out.plain(text)}"
        if held_out.split_of_key(key) is not split:
            return None
    return text, after


def _draw(rng: np.random.Generator, scene: Scene, kind: str) -> Edit:
    """Return an edit of a kind; it may turn out to be impossible."""
    if kind == "add":
        return Edit("add", None, _new(rng, scene))
    thing = pick(rng, scene.things)
    name = refer(rng, scene, thing)
    if kind == "remove":
        becomes = _NOTHING
    elif kind == "recolour":
        becomes = Description(colour=scenes.changed(rng, thing, "colour").colour)
    elif kind == "resize":
        becomes = Description(size=next(size for size in SIZES if size != thing.size))
    elif kind == "replace":
        becomes = _kind(rng, shape=1.0)
    else:
        becomes = somewhere(rng, scene, but=thing)
    return Edit(kind, name, becomes)


def _kind(rng: np.random.Generator, shape: float = 0.97) -> Description:
    """Return a description of something new; with a chance of `1 - shape` its shape is open."""
    named = rng.random() < shape
    return Description(
        pick(rng, SHAPES) if named else None,
        pick(rng, COLOURS) if rng.random() < 0.8 or not named else None,
        pick(rng, SIZES) if rng.random() < 0.4 else None,
    )


def _new(rng: np.random.Generator, scene: Scene) -> Description:
    """Return a description of something new and, mostly, where."""
    where = somewhere(rng, scene) if rng.random() < 0.75 else _NOTHING
    return _kind(rng)._replace(place=where.place, word=where.word, other=where.other)
