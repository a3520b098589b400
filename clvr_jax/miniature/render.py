"""Scenes to pictures, on the device: antialiased shapes, jittered places, a little texture.

Everything random comes from one key and its cell, never from what else is in the scene. So the
pictures before and after an edit, rendered with one key, are equal outside the edited cells.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.miniature.scene import CELLS, ROWS, SHAPES, indices_of
from clvr_jax.typing import Array, Float, Int, PRNGKey, UInt8

CELL = 16  # pixels of a cell's side
SIDE = CELL * ROWS
RADII = (3.9, 6.2)  # of small and large, in pixels
JITTER = 0.5  # largest shift of a centre, in pixels, both ways
PALETTE = (
    (0.86, 0.14, 0.16),
    (0.96, 0.55, 0.08),
    (0.95, 0.86, 0.14),
    (0.14, 0.62, 0.26),
    (0.16, 0.78, 0.86),
    (0.14, 0.28, 0.86),
    (0.58, 0.20, 0.76),
    (0.09, 0.09, 0.11),
)
BACKGROUND = (0.93, 0.93, 0.91)
TEXTURE = 0.012  # standard deviation of the grain
STAINS = 0.02  # of the shade of the paper
SHADES = 0.03  # of each thing's own colour

Codes = Int[Array, "b cell"]


@jax.jit
def render(codes: Codes, keys: PRNGKey) -> UInt8[Array, "b y x 3"]:
    """Return pictures (b, 64, 64, 3).

    Args:
      codes: kinds by cell (b, 16), as `Scene.codes`.
      keys: one for each picture (b,); equal keys give equal jitter and texture.
    """
    cells = jax.vmap(_cells)(codes, keys)
    grid = einops.rearrange(cells, "b (r c) y x rgb -> b (r y) (c x) rgb", r=ROWS)
    pixels = jnp.round(jnp.clip(grid, 0, 1) * 255).astype(jnp.uint8)
    return jax.lax.optimization_barrier(pixels)  # else XLA renders anew wherever they are used


def keys(seeds: np.ndarray) -> PRNGKey:
    """Return the keys of (b,) seeds, each below 2^32."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def _cells(codes: Int[Array, "cell"], key: PRNGKey) -> Float[Array, "cell y x rgb"]:
    """The cells of one picture, values around [0, 1]."""
    shift, grain, stain, shade = jax.random.split(key, 4)
    centres = jax.random.uniform(shift, (CELLS, 2), minval=-JITTER, maxval=JITTER)
    shape, colour, size = indices_of(jnp.maximum(codes, 1))
    there = (codes > 0)[:, None, None, None]
    radius = jnp.asarray(RADII)[size]

    line = jnp.arange(CELL) + 0.5 - CELL / 2
    y = line[None, :, None] - centres[:, 0, None, None]
    x = line[None, None, :] - centres[:, 1, None, None]
    r = radius[:, None, None]
    x, y = x / r, y / r  # every shape has radius 1 there
    distances = jnp.stack([distance(x, y) for distance in OUTLINES], axis=-1)
    index = jnp.broadcast_to(shape[:, None, None, None], (*distances.shape[:-1], 1))
    distance = jnp.take_along_axis(distances, index, axis=-1) * r[..., None]
    cover = jnp.clip(0.5 - distance, 0, 1) * there

    shades = SHADES * jax.random.uniform(shade, (CELLS, 1, 1, 1), minval=-1.0, maxval=1.0)
    paint = jnp.asarray(PALETTE)[colour][:, None, None, :] + shades
    stains = STAINS * jax.random.uniform(stain, (1, 1, 1, 1), minval=-1.0, maxval=1.0)
    ground = jnp.asarray(BACKGROUND) + stains
    texture = TEXTURE * jax.random.normal(grain, (CELLS, CELL, CELL, 1))
    return ground * (1 - cover) + paint * cover + texture


def _circle(x, y):
    return jnp.hypot(x, y) - 1


def _square(x, y):
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.86


def _ring(x, y):
    return jnp.abs(jnp.hypot(x, y) - 0.78) - 0.24


def _cross(x, y):
    x, y = jnp.abs(x), jnp.abs(y)
    bar = lambda along, across: jnp.maximum(along - 1.0, across - 0.3)
    return jnp.minimum(bar(x, y), bar(y, x))


def _polygon(corners: np.ndarray, x, y):
    """Signed distance to a polygon with corners (n, 2) as x, y; negative inside."""
    start, edge = corners, np.roll(corners, -1, axis=0) - corners
    wx, wy = x[..., None] - start[:, 0], y[..., None] - start[:, 1]
    ex, ey = edge[:, 0], edge[:, 1]
    along = jnp.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
    nearest = jnp.min((wx - ex * along) ** 2 + (wy - ey * along) ** 2, axis=-1)
    # an odd number of edges crosses the line to the right of an inner point
    crosses = (wy >= 0) != (wy >= ey)
    right = (ex * wy - ey * wx) * np.where(ey < 0, -1.0, 1.0) > 0
    inside = jnp.sum(crosses & right, axis=-1) % 2 == 1
    return jnp.where(inside, -1.0, 1.0) * jnp.sqrt(nearest)


def _corners(count: int, radii: tuple[float, ...]) -> np.ndarray:
    """Corners around the origin, the first at the top, with the given radii in turn."""
    angles = 2 * np.pi * np.arange(count) / count
    lengths = np.resize(radii, count)
    return np.stack([lengths * np.sin(angles), -lengths * np.cos(angles)], axis=1)


TRIANGLE = _corners(3, (1.12,)) + np.array([0.0, 0.16])
STAR = _corners(10, (1.12, 0.46)) + np.array([0.0, 0.06])
# of each of `SHAPES`: from x, y in its radius to the signed distance to its border, negative inside
OUTLINES = tuple(
    {
        "circle": _circle,
        "square": _square,
        "triangle": functools.partial(_polygon, TRIANGLE),
        "star": functools.partial(_polygon, STAR),
        "ring": _ring,
        "cross": _cross,
    }[name]
    for name in SHAPES
)
