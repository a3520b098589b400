"""Detector two: classical image analysis, for evaluation alone.

Ink is told from paper by its contrast and cut into connected components; the hue of a component's
ink names its colour; the moments of the ink (amount, spread, three-, four- and fivefold symmetry,
ink at the centre) name shape and size. It knows the renderer by measured numbers only and shares
no method with `detect`, which compares with templates, so neither repeats the other's errors.
"""

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from clvr_jax.miniature.readings import Readings, read
from clvr_jax.miniature.scene import CELLS, COLOURS, COLUMNS, ROWS, SIZES, code_of
from clvr_jax.typing import Array

CHUNK = 64  # pictures at once
SMOOTH = 0.6  # pixels of blur before all else: noise shrinks by half, moments hardly change
INK = 0.22  # contrast from which a pixel is ink; yellow has 0.77, its small ring 0.5, paper 0.06
GROW = 2  # pixels around a component that still hold its soft edge
WIDEST = 15  # pixels; what is wider is two things that touch, and is cut along the cells
SPECK = 4.0  # pixels of ink that do not count as a thing; the smallest thing has 17

# Ink of each colour: how much darker than paper red, green and blue are, measured on renders.
INKS = np.array(
    [
        (0.07, 0.79, 0.75),
        (-0.03, 0.38, 0.83),
        (-0.02, 0.07, 0.77),
        (0.79, 0.31, 0.65),
        (0.77, 0.15, 0.05),
        (0.79, 0.65, 0.05),
        (0.35, 0.73, 0.15),
        (0.84, 0.84, 0.80),
    ]
)
BLACK = COLOURS.index("black")
# Chroma as a share of contrast: black has 0.03, green the least of the others with 0.33.
GREY = 0.17

# Moments of each kind: log of the pixels of ink, log of their mean square distance to the centroid,
# three-, four- and fivefold symmetry, and ink at the centre. Measured: means over 1,200 renders, a
# third of them blurred by 0.7 pixels, a third sized to 48 pixels and back.
MOMENTS = np.array(
    [
        (3.87, 2.19, 0.00, -0.01, 0.00, 0.99),  # small circle
        (4.79, 3.02, 0.00, 0.00, 0.00, 1.00),  # large circle
        (3.82, 2.19, 0.00, -0.31, 0.00, 0.99),  # small square
        (4.73, 3.01, 0.00, -0.37, 0.00, 0.99),  # large square
        (3.23, 1.83, 0.47, -0.02, 0.01, 0.87),  # small triangle
        (4.15, 2.60, 0.57, -0.01, 0.00, 0.99),  # large triangle
        (3.16, 1.87, 0.01, -0.03, -0.45, 0.82),  # small star
        (4.07, 2.62, 0.00, 0.00, -0.65, 0.97),  # large star
        (3.58, 2.44, 0.00, -0.01, 0.00, 0.24),  # small ring
        (4.50, 3.29, 0.00, 0.00, 0.00, 0.03),  # large ring
        (3.44, 2.06, 0.00, 0.38, 0.00, 0.85),  # small cross
        (4.36, 2.86, 0.00, 0.52, 0.00, 0.97),  # large cross
    ]
)
# What counts as one step away, about twice the deviation within a kind: noise adds to it.
SPREAD = np.array((0.07, 0.09, 0.05, 0.06, 0.08, 0.08))
# Each pair is (still good, bad): confidence falls from 1 to 0 between them, `SURE` halfway. In
# brackets what 1,000 renders reach, and what they reach with noise of 0.03.
HUE = (0.22, 0.40)  # distance to the hue over those to both neighbours (noise: 0.10); halfway 0.5
GREYNESS = (0.06, 0.02)  # distance of the chroma's share from `GREY` (0.13; 0.13)
MIXED = (0.05, 0.13)  # share of ink (root mean square) not of the component's colour (0.02; 0.06)
FAR = (3.0, 5.2)  # distance to the nearest kind, in units of `SPREAD` (3.6; 4.3)
CLOSE = (2.0, 0.0)  # by which the second kind is further away, in the same units (3.2; 1.1)
STRAY = (4.0, 7.0)  # pixels from the cell's middle, either axis (2.2; 2.3)
FAINT = (0.65, 0.45)  # strongest contrast over its colour's (0.77; 0.78), blurred rings 0.63
SPECKS = (1.0, 4.0)  # pixels of ink in a cell beside its thing (0; 0)
BLOTCH = (0.03, 0.09)  # contrast of the paper over 3 pixels, anywhere (0.03; 0.05)
SHEET, TINT = (0.93, 0.93, 0.91), 0.15  # the paper and how far it may be off in any channel
NOISE = 0.10  # standard deviation of the paper that counts as noise; renders have 0.012


def detect(pictures: UInt8[np.ndarray, "b y x 3"] | UInt8[Array, "b y x 3"]) -> Readings:
    """Return what pictures of 64x64 hold, read from their pixels alone."""
    pictures = np.asarray(pictures)
    parts = [(np.zeros((0, CELLS), int), np.zeros((0, CELLS)), np.zeros(0, bool))]
    for start in range(0, len(pictures), CHUNK):
        parts.append(_detect(pictures[start : start + CHUNK].astype(np.float32) / 255))
    return read(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _detect(pictures):
    """Codes (b, 16), confidence (b, 16) and whether the paper is quiet (b,)."""
    b = len(pictures)
    sheet = np.median(pictures.reshape(b, -1, 3), axis=1)
    raw = sheet[:, None, None] - pictures
    dark = ndimage.gaussian_filter(raw, (0, SMOOTH, SMOOTH, 0))
    labels, count = _components(np.linalg.norm(dark, axis=-1) > INK)
    paper = labels == 0
    noise = np.array([np.median(np.abs(x[p])) if p.any() else 1 for x, p in zip(raw, paper)])
    blotch = ndimage.gaussian_filter(dark * paper[..., None], (0, 1.2, 1.2, 0))
    blotch = np.linalg.norm(blotch, axis=-1) * paper - noise[:, None, None] / 2
    pale = np.abs(sheet - SHEET).max(1) < TINT
    quiet = pale & (1.4826 * noise < NOISE) & (_good(blotch.max((1, 2)), BLOTCH) >= 0.5)

    codes, confidence = np.zeros((b, CELLS), int), np.ones((b, CELLS))
    ink = _Ink(dark, labels, count)
    if not count:
        return codes, confidence, quiet
    kind, sure, mass, (y, x) = _kinds(ink)
    cell_side = pictures.shape[1] // ROWS
    row = np.clip(y // cell_side, 0, ROWS - 1).astype(int)
    column = np.clip(x // cell_side, 0, COLUMNS - 1).astype(int)
    middle = np.stack([row, column]) * cell_side + cell_side / 2
    sure = np.minimum(sure, _good(np.abs(np.stack([y, x]) - middle).max(0), STRAY))
    place = ink.picture, row * COLUMNS + column

    amount, largest = np.zeros((b, CELLS)), np.zeros((b, CELLS))
    np.add.at(amount, place, mass)
    np.maximum.at(largest, place, mass)
    thing = (mass == largest[place]) & (mass > SPECK)
    at = tuple(index[thing] for index in place)
    codes[at], confidence[at] = kind[thing], sure[thing]
    beside = amount - np.where(codes > 0, largest, 0)
    return codes, np.minimum(confidence, _good(beside, SPECKS)), quiet


def _good(x, limits):
    """1 on the near side of the first limit, 0 beyond the second."""
    return np.clip((limits[1] - x) / (limits[1] - limits[0]), 0, 1)


def _components(ink):
    """Labels (b, y, x) from 1, with their soft edges, and how many there are."""
    plane = np.zeros((3, 3, 3), int)
    plane[1] = 1  # corners connect too; pictures never do
    labels, count = ndimage.label(ink, plane)
    sides = [max(s.stop - s.start for s in span[1:]) for span in ndimage.find_objects(labels)]
    wide = [i for i, side in enumerate(sides, 1) if side > WIDEST]
    if wide:
        line = np.arange(ink.shape[1]) * ROWS // ink.shape[1]
        cells = 1 + line[:, None] * COLUMNS + line
        cut = np.where(np.isin(labels, wide), (labels + count) * (CELLS + 1) + cells, labels)
        names = np.union1d(0, cut)  # numbered again from 1; paper stays 0
        labels, count = np.searchsorted(names, cut), len(names) - 1
    for _ in range(GROW):
        labels = np.where(labels == 0, ndimage.maximum_filter(labels, (1, 3, 3)), labels)
    return labels, count


class _Ink:
    """Pixels of all components: their component, place and contrast, and sums over components."""

    def __init__(self, dark, labels, count):
        picture, y, x = np.nonzero(labels)
        self.component, self.count = labels[picture, y, x] - 1, count
        self.y, self.x, self.dark = y + 0.5, x + 0.5, dark[picture, y, x]
        self.picture = np.zeros(count, int)
        self.picture[self.component] = picture

    def sum(self, values):
        """Sum (component,) of values (pixel,), which may be complex."""
        if np.iscomplexobj(values):
            return self.sum(values.real) + 1j * self.sum(values.imag)
        return np.bincount(self.component, values, self.count)


def _kinds(ink):
    """Code, confidence, pixels of ink and centroid of each component."""
    colour, sure = _colours(ink)
    own = INKS[colour][ink.component]
    cover = np.clip((ink.dark * own).sum(1) / (own**2).sum(1), 0, 1.2)
    mass, features, centroid = _features(ink, cover)
    distance = np.linalg.norm((features[:, None] - MOMENTS) / SPREAD, axis=-1)
    order = np.sort(distance, axis=1)
    kind = distance.argmin(1)
    shape, size = np.divmod(kind, len(SIZES))
    sure = np.minimum(sure, _good(order[:, 0], FAR))
    sure = np.minimum(sure, _good(order[:, 1] - order[:, 0], CLOSE))
    return code_of(shape, colour, size), sure, mass, centroid


def _colours(ink):
    """Colour of each component by its hue, and how sure it is one and only that."""
    contrast = np.linalg.norm(ink.dark, axis=1)
    top = np.zeros(ink.count)
    np.maximum.at(top, ink.component, contrast)
    core = contrast >= 0.7 * top[ink.component]
    mean = np.stack([ink.sum(channel * core) for channel in ink.dark.T], 1)
    mean /= ink.sum(core * 1.0)[:, None]
    hue, share = _hue(mean)
    hues = _hue(INKS)[0]
    away = np.abs(np.angle(np.exp(1j * (hue[:, None] - hues))))
    away[:, BLACK] = np.inf
    near = np.sort(away, axis=1)[:, :2]
    grey = share < GREY
    colour = np.where(grey, BLACK, away.argmin(1))
    unmixed = np.where(grey, 1, _good(near[:, 0] / near.sum(1), HUE))
    sure = np.minimum(unmixed, _good(np.abs(share - GREY), GREYNESS))

    # Soft edges are thinner ink of the same direction; what is off that direction is other ink.
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    along = (ink.dark * unit[ink.component]).sum(1)
    inked = contrast > INK
    off = ink.sum((contrast**2 - along**2) * inked) / ink.sum(contrast**2 * inked)
    strength = top / np.linalg.norm(INKS[colour], axis=1)
    sure = np.minimum(sure, _good(np.sqrt(np.maximum(off, 0)), MIXED))
    return colour, np.minimum(sure, _good(strength, FAINT))


def _hue(dark):
    """Hue in radians of contrasts (..., rgb), and their chroma as a share of their length."""
    red, green, blue = -np.moveaxis(dark, -1, 0)
    chroma = (2 * red - green - blue + 1j * np.sqrt(3) * (green - blue)) / np.sqrt(6)
    return np.angle(chroma), np.abs(chroma) / np.linalg.norm(dark, axis=-1)


def _features(ink, cover):
    """Pixels of ink, the features `MOMENTS` is made of (component, 6), and the centroid (y, x)."""
    mass = ink.sum(cover) + 1e-6
    y, x = ink.sum(cover * ink.y) / mass, ink.sum(cover * ink.x) / mass
    z = (ink.x - x[ink.component]) + 1j * (ink.y - y[ink.component])
    r = np.abs(z)
    fold = lambda n: ink.sum(cover * z**n) / (ink.sum(cover * r**n) + 1e-6)
    spread = ink.sum(cover * r**2) / mass
    middle = np.exp(-(r**2) / 2)
    filled = ink.sum(cover * middle) / (ink.sum(middle) + 1e-6)
    parts = (np.log(mass), np.log(spread + 1e-6), fold(3).imag, fold(4).real, fold(5).imag, filled)
    return mass, np.stack(parts, 1), (y, x)
