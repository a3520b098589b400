"""Detector one: each thing is the template that explains it best. For teacher, filter, rewards.

A centroid says where a thing is, wherever it strayed; least squares over subpixel shift, shape,
size and a free colour says what it is; what no template explains says whether it is clean.
`detect_eval` reads the same by other means.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from clvr_jax.miniature.readings import Readings, read
from clvr_jax.miniature.render import BACKGROUND, CELL, PALETTE, SIDE
from clvr_jax.miniature.scene import CELLS, COLUMNS, ROWS, SHAPES, SIZES, code_of
from clvr_jax.miniature.templates import BLUR, PHASES, SHARP, WINDOW, bank, smoothing
from clvr_jax.typing import Array

BATCHES = (16, 128)  # pictures at once; each size compiles for seconds
REACH = 8.5  # half a side of the window that looks for a thing's centre; neighbours begin at 7.9
SOFT = 2.0  # pixels; a pixel is shared between two centres within half a pixel of the middle
STEPS = 4  # of the centre towards the thing; each gains about two thirds of the way
RIM = 5.5  # pixels; a centroid further out in its cell is the rim of what a neighbour holds

# Contrast to the paper is the length of a colour difference: yellow has 0.77, black 1.43.
PAPER = (0.10, 0.30)  # below it is paper, above it counts fully towards a thing's centre
MASS = 4.0  # pixels; the smallest thing (a small star) has 17

# Each pair is (still good, bad): confidence falls from 1 to 0 between them, `SURE` halfway. In
# brackets what 1,000 renders reach, and what they reach as JPEG of quality 80.
ANGLE = (4.0, 11.0)  # degrees to the palette (5.2; 14); halfway from orange to yellow is 9.5
FAINT = (0.75, 0.55)  # strength of the colour (0.91; 0.86); a third of the way to paper is bad
STRONG = (1.15, 1.4)  # (1.09; 1.11)
MISFIT = (0.02, 0.09)  # share of a thing's energy that no template explains (0.016; 0.074)
MARGIN = (0.02, -0.01)  # by which the best beats other kinds, of the energy (0.021; 0.001). Low
# since a circle and a square of small size, blurred by 1 pixel, differ by 0.006 only
STRAY = (4.0, 7.0)  # pixels from the cell's middle, either axis (2.2; 2.3)
LEFT = (0.10, 0.24)  # contrast left once things are taken out, over 4x4 pixels (0.158; 0.196)
LEFT_EMPTY = (0.06, 0.18)  # the same in empty cells, where no template's error adds to it
TINT = 0.15  # of the paper off its colour, any channel; stains 0.02, brightness of 5 % 0.05
NOISE = 0.10  # standard deviation of the paper that counts as noise; renders have 0.012


def detect(pictures: UInt8[np.ndarray, "b y x 3"] | UInt8[Array, "b y x 3"]) -> Readings:
    """Return what pictures of 64x64 hold, read from their pixels alone.

    Pictures go to the device in groups of a size in `BATCHES`, the last one filled up, so that few
    shapes are compiled whatever the sizes asked for.

    Raises:
      ValueError: pictures of another size.
    """
    pictures = np.asarray(pictures)
    if pictures.shape[1:3] != (SIDE, SIDE):
        raise ValueError(f"pictures are {SIDE}x{SIDE}, given an array of {pictures.shape}")
    parts = [(np.zeros((0, CELLS), np.int32), np.zeros((0, CELLS), np.float32), np.zeros(0, bool))]
    for start in range(0, len(pictures), BATCHES[-1]):
        part = pictures[start : start + BATCHES[-1]]
        size = next(size for size in BATCHES if size >= len(part))
        padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)])
        parts.append(tuple(np.asarray(x)[: len(part)] for x in _detect(padded, bank())))
    return read(*(np.concatenate(x) for x in zip(*parts, strict=True)))


@jax.jit
def _detect(pictures, templates):
    """Codes (b, 16), confidence (b, 16) and whether nothing else is there (b,)."""
    dark, noise, paper = _contrast(pictures.astype(jnp.float32) / 255)
    centres, there = _centres(jnp.linalg.norm(dark, axis=-1))
    corners = jnp.round(centres).astype(jnp.int32)
    own = _owners(centres, there)
    windows = _windows(dark, own, corners)
    energy = jnp.sum(windows**2, axis=(2, 3))

    # For template t and window w the best colour is <t, w> / <t, t>; it explains <t, w>^2 / <t, t>.
    basis, unit, norms = templates
    match = jnp.einsum("bckr,tr->bckt", jnp.einsum("bcpk,rp->bckr", windows, basis), unit)
    explained = jnp.sum(match**2, axis=2)
    best = jnp.argmax(explained, axis=-1)
    kind = best // (len(SHARP) * len(PHASES) ** 2)
    shape, size = kind // len(SIZES), kind % len(SIZES)
    kinds = len(SHAPES) * len(SIZES)
    by_kind = jnp.max(explained.reshape(*best.shape, kinds, -1), axis=-1)
    first = jnp.max(by_kind, axis=-1)
    second = jnp.max(jnp.where(jnp.arange(kinds) == kind[..., None], 0, by_kind), axis=-1)
    weight = jnp.take_along_axis(match, best[:, :, None, None], axis=-1)[..., 0]
    paint = weight / norms[best][..., None]  # (b, cell, rgb) the thing's contrast to the paper

    colour, angle, strength = _colour(paint)
    spread = noise**2 * _NOISE_LEFT * 3 * WINDOW**2
    misfit = (energy - first - spread[:, None]) / (energy + 1e-6)
    margin = (first - second) / (first + 1e-6)
    stray = jnp.max(jnp.abs(centres - _MIDDLES), axis=-1)
    tests = ((angle, ANGLE), (misfit, MISFIT), (margin, MARGIN), (strength, FAINT))
    tests = (*tests, (strength, STRONG), (stray, STRAY))
    sure = functools.reduce(jnp.minimum, (_good(value, limits) for value, limits in tests))
    fits = (unit[best] @ basis).reshape(*best.shape, WINDOW, WINDOW, 1)
    fits = jnp.where(there[..., None, None, None], fits * weight[:, :, None, None, :], 0)
    left = _left(dark - _painted(fits, own, corners)) - noise[:, None] / 2
    remains = jnp.where(there, _good(left, LEFT), _good(left, LEFT_EMPTY))
    tint = jnp.max(jnp.abs(paper - jnp.asarray(BACKGROUND)), axis=-1)
    tidy = (noise < NOISE) & (tint < TINT)
    codes = jnp.where(there, code_of(shape, colour, size), 0)
    return codes, jnp.minimum(jnp.where(there, sure, 1.0), remains), tidy


def _good(x, limits):
    """1 on the near side of the first limit, 0 beyond the second."""
    return jnp.clip((limits[1] - x) / (limits[1] - limits[0]), 0, 1)


def _contrast(pictures):
    """How much darker than its paper each blurred pixel is; the paper's noise; the paper."""
    flat = pictures.reshape(len(pictures), -1, 3)[:, ::3]  # a third of the pixels tells enough
    middle = _median(flat, axis=1)
    near = jnp.abs(flat - middle[:, None]) < 0.1
    paper = jnp.sum(flat * near, axis=1) / (jnp.sum(near, axis=1) + 1e-6)  # finer than a median
    noise = 1.4826 * _median(jnp.abs(flat - paper[:, None]), axis=(1, 2))
    dark = paper[:, None, None] - pictures
    return jnp.einsum("yv,bvuk,xu->byxk", _SMOOTH, dark, _SMOOTH), noise, paper


def _median(x, axis):
    """Median of values in [0, 1] to 1/1024, by bisection: sorting costs ten times as much."""

    def halve(i, low):
        trial = low + 0.5 ** (i + 1)
        below = jnp.mean(x < jnp.expand_dims(trial, axis), axis=axis)
        return jnp.where(below <= 0.5, trial, low)

    return jax.lax.fori_loop(0, 10, halve, jnp.zeros_like(jnp.mean(x, axis=axis)))


def _centres(contrast):
    """Centroid (b, 16, 2) of what each cell holds, and whether it holds a thing (b, 16).

    Cells that hold more than a neighbour's rim claim a thing; then centroids move, each over the
    pixels nearer to it than to others (k-means, softly, so that it is a product of two axes).
    """
    solid = jnp.clip((contrast - PAPER[0]) / (PAPER[1] - PAPER[0]), 0, 1)
    line = jnp.arange(SIDE) + 0.5
    centres = jnp.broadcast_to(_MIDDLES, (len(contrast), CELLS, 2))
    there = jnp.ones(centres.shape[:2])
    for step in range(STEPS):
        y, x = ((line - centres[..., i, None]) for i in (0, 1))
        reach = CELL / 2 if step == 0 else REACH
        wide = lambda d, reach=reach: jnp.clip(reach + 0.5 - jnp.abs(d), 0, 1)
        near = lambda d: jnp.exp(-(d**2) / (2 * SOFT**2))
        y, x = (wide(d) * (1 if step == 0 else near(d)) for d in (y, x))
        y = y * there[..., None]
        total = jnp.einsum("bcy,bcx->byx", y, x)
        share = solid / (total + 1e-12)
        rows = jnp.einsum("byx,bcx->bcy", share, x) * y
        columns = jnp.einsum("byx,bcy->bcx", share, y) * x
        mass = jnp.sum(rows, -1)
        moved = jnp.stack([rows @ line, columns @ line], -1) / (mass[..., None] + 1e-6)
        off = jnp.max(jnp.abs(moved - _MIDDLES), axis=-1)
        there = there * (mass > MASS) * (off < (RIM if step == 0 else CELL / 2))
        centres = jnp.where(there[..., None] > 0, moved, _MIDDLES)
    return centres, there > 0


def _owners(centres, there):
    """Cell (b, y, x) whose thing is nearest to each pixel."""
    line = jnp.arange(SIDE) + 0.5
    squares = (line - centres[..., None]) ** 2  # (b, cell, 2, pixel)
    distance = squares[:, :, 0, :, None] + squares[:, :, 1, None, :]
    return jnp.argmin(jnp.where(there[..., None, None], distance, jnp.inf), axis=1)


def _windows(dark, own, corners):
    """What each thing owns around its centre: (b, cell, pixel, rgb), 0 for what others own."""
    half = WINDOW // 2
    pad = ((half, half), (half, half))
    cut = lambda image, corner: jax.lax.dynamic_slice(
        image, (corner[0], corner[1], 0), (WINDOW, WINDOW, 4)
    )

    def one(dark, own, corners):
        both = jnp.concatenate([dark, own[..., None].astype(dark.dtype)], axis=-1)
        both = jnp.pad(both, (*pad, (0, 0)))
        parts = jax.vmap(cut, (None, 0))(both, corners)
        mine = parts[..., 3] == jnp.arange(CELLS)[:, None, None]
        return (parts[..., :3] * mine[..., None]).reshape(CELLS, -1, 3)

    return jax.vmap(one)(dark, own, corners)


def _painted(fits, own, corners):
    """The fits (b, cell, y, x, rgb) put into pictures, each where its thing owns the pixels."""
    batch = jnp.arange(len(own))[:, None, None]
    corner = corners[batch, own]  # (b, y, x, 2)
    y = jnp.arange(SIDE)[:, None] - corner[..., 0] + WINDOW // 2
    x = jnp.arange(SIDE)[None, :] - corner[..., 1] + WINDOW // 2
    near = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
    pixel = jnp.clip(y, 0, WINDOW - 1) * WINDOW + jnp.clip(x, 0, WINDOW - 1)
    fits = fits.reshape(len(fits), CELLS * WINDOW**2, 3)
    index = (own * WINDOW**2 + pixel).reshape(len(fits), -1, 1)
    picked = jnp.take_along_axis(fits, index, axis=1).reshape(*own.shape, 3)
    return jnp.where(near[..., None], picked, 0)


def _left(left):
    """Most contrast left in each cell (b, 16), as root mean square over 4x4 pixels."""
    power = jnp.einsum("yv,bvu,xu->byx", _BOX, jnp.sum(left**2, axis=-1), _BOX)
    cells = power.reshape(len(left), ROWS, CELL, COLUMNS, CELL)
    return jnp.sqrt(jnp.max(cells, axis=(2, 4))).reshape(len(left), CELLS)


def _colour(paint):
    """Palette index, angle to it in degrees and strength along it of contrasts (..., rgb)."""
    palette = jnp.asarray(BACKGROUND) - jnp.asarray(PALETTE)
    length = jnp.linalg.norm(palette, axis=-1)
    along = paint @ (palette / length[:, None]).T
    colour = jnp.argmax(along, axis=-1)  # of unit vectors: the smallest angle
    along = jnp.max(along, axis=-1)
    cosine = along / (jnp.linalg.norm(paint, axis=-1) + 1e-6)
    return colour, jnp.rad2deg(jnp.arccos(jnp.clip(cosine, -1, 1))), along / length[colour]


_SMOOTH = smoothing(SIDE, BLUR)
_NOISE_LEFT = float(np.sum(_SMOOTH[SIDE // 2] ** 2) ** 2)  # of the noise's variance after the blur
_BOX = np.array([[-2 < i - j <= 2 for j in range(SIDE)] for i in range(SIDE)], np.float32) / 4
_MIDDLES = (np.stack(np.divmod(np.arange(CELLS), COLUMNS), -1).astype(np.float32) + 0.5) * CELL
