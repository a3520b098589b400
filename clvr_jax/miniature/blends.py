"""Pictures as models draw them: with things that are partly others, faint, or too many."""

import numpy as np

from clvr_jax.miniature import scenes
from clvr_jax.miniature.chance import Rng, pick
from clvr_jax.miniature.detect import detect
from clvr_jax.miniature.held_out import Split, is_clean, taints
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.readings import SURE
from clvr_jax.miniature.scene import CELLS, COLOURS, MOST, SIZES, Scene, Thing, from_codes
from clvr_jax.miniature.scenes import changed

BLURRED = 0.3  # share of drawn pictures in which a thing is partly another, or partly gone
UNCLEAR = 0.6  # share of those in which it is unclear then, as far as one comes out so
_BLURS = 8  # tries
_BLENDS = ("shape", "colour", "size", "gone")  # in what a thing is partly another
_SHARES = (0.05, 0.6)  # of what it is partly like
_MANY, _HALF = 0.5, (0.35, 0.5)  # the same where many are: share of things, and of the other
CROWDED = 0.4  # share of drawn pictures with more things than there may be, of those almost full
_MORE = 2  # things more than that, at most


def drawn(rng: Rng, picture: Picture, base: Picture | None = None) -> Picture:
    """Return a picture as models draw it.

    Args:
      rng: decides what is unclear in it, and whether there is more than there may be.
      picture: what is drawn.
      base: what it was made from; what was unclear there and has not been changed is so.
    """
    if base is not None and base.blend is not None:
        kept = np.where(base.codes == picture.codes, base.blend, picture.codes)
        if (kept != picture.codes).any():
            unclear = tuple(cell for cell in base.unclear if kept[cell] != picture.codes[cell])
            return picture._replace(blend=kept, share=base.share, unclear=unclear)
    if np.count_nonzero(picture.codes) >= MOST - 1 and rng.random() < CROWDED:
        return _crowded(rng, picture)
    return _blurred(rng, picture) if rng.random() < BLURRED else picture


def many(rng: Rng, picture: Picture) -> Picture:
    """Return the picture with many things partly others, or partly gone; as it is if none comes so.

    The teacher's own detector says which of them are unclear: most. What is not blended is clear,
    so that the look of blends can be learnt before their boundary.
    """
    scene = from_codes(picture.codes)
    for _ in range(_BLURS):
        other = scene
        for thing in scene.things:
            if rng.random() < _MANY:
                other = _other(rng, other, thing)
        blurred = picture._replace(blend=other.codes(), share=rng.uniform(*_HALF))
        seen = _seen(blurred) if is_clean(other) else None
        if seen is not None:
            return blurred._replace(unclear=seen)
    return picture


def _other(rng: Rng, scene: Scene, thing: Thing) -> Scene:
    """The scene that a picture of it is blended with to make one of its things unclear."""
    left, kind = scene.without(thing.cell), pick(rng, _BLENDS)
    return left if kind == "gone" else left.put(_like(rng, thing, kind))


def _seen(picture: Picture) -> tuple[int, ...] | None:
    """Cells of things that the teacher's detector is not sure of; None if it sees anything else."""
    seen = detect(rendered([picture], 1))
    unsure = seen.confidence[0] < SURE
    if (seen.codes[0] != picture.codes).any() or (unsure & (picture.codes == 0)).any():
        return None
    return tuple(np.flatnonzero(unsure).tolist())


def _blurred(rng: Rng, picture: Picture) -> Picture:
    """The picture with one thing that is partly another, or partly gone; as it is if none comes so.

    The teacher's own detector says whether it is unclear, and most like what it was.
    """
    scene, unclear = from_codes(picture.codes), bool(rng.random() < UNCLEAR)
    for _ in range(_BLURS if scene.things else 0):
        thing = pick(rng, scene.things)
        other = _other(rng, scene, thing)
        blurred = picture._replace(blend=other.codes(), share=rng.uniform(*_SHARES))
        if is_clean(other) and _seen(blurred) == (thing.cell,) * unclear:
            return blurred._replace(unclear=(thing.cell,) * unclear)
    return picture


def _like(rng: Rng, thing: Thing, kind: str) -> Thing:
    """The thing in another shape, colour or size; of colours half of the time the next one."""
    if kind != "colour" or rng.random() < 0.5:
        return changed(rng, thing, kind)
    index = COLOURS.index(thing.colour)
    near = [COLOURS[i] for i in (index - 1, index + 1) if 0 <= i < len(COLOURS)]
    return thing._replace(colour=pick(rng, near))


def _crowded(rng: Rng, picture: Picture) -> Picture:
    """The picture with more things than there may be; the first ones count, as `see` has it."""
    things = list(from_codes(picture.codes).things)
    count = MOST + int(rng.integers(1, _MORE + 1))
    while len(things) < count:
        free = [cell for cell in range(CELLS) if all(thing.cell != cell for thing in things)]
        new = Thing(pick(rng, free), *scenes.kind(rng, None, None, Split.TRAIN), pick(rng, SIZES))
        if not taints(new, tuple(things)):
            things.append(new)
    codes = Scene(tuple(sorted(things)[:MOST])).codes()
    blend = codes.copy()
    for more in sorted(things)[MOST:]:
        blend[more.cell] = more.code
    return Picture(codes, picture.seed, blend, 1.0)
