"""Templates of `detect`: every shape and size, at subpixel shifts, sharp and soft."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.miniature import render
from clvr_jax.miniature.scene import SHAPES

WINDOW = 20  # pixels around a thing: 13.9 of the largest, its blur, and a shift of up to 2
# Blur of picture and templates before they are compared: grain and noise shrink to a half, and
# a picture that a VAE softened (0.7 pixels) still fits.
BLUR = 0.6
PHASES = np.arange(-3, 4) / 4  # shifts tried around the rounded centroid, in pixels
SHARP = (0.0, 0.8)  # further blur of the templates: as rendered, and as a VAE leaves it
RANK = 64  # of the bank's basis; loses 4e-4 of the templates' energy, of one at most 2e-3


@functools.cache
def bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Basis (rank, pixel), templates in it (kind * sharp * phase, rank) of length 1, and lengths.

    The centroid, not the centre, of each stands in the window's middle moved by its phase, since
    centroids are what pictures tell.
    """
    line = np.arange(WINDOW) + 0.5 - WINDOW / 2
    blurs = [smoothing(WINDOW, np.hypot(BLUR, more)) for more in SHARP]
    shifts = np.stack(np.meshgrid(PHASES, PHASES, indexing="ij"), -1).reshape(-1, 2)

    @jax.jit
    def covers(radius, shifts):  # (shape, phase, 2) to (shape, phase, y, x)
        y = (line[:, None] - shifts[..., :1, None]) / radius
        x = (line[None, :] - shifts[..., 1:, None]) / radius
        signed = [distance(x[i], y[i]) for i, distance in enumerate(render.OUTLINES)]
        return jnp.clip(0.5 - jnp.stack(signed) * radius, 0, 1)

    kinds = []
    for radius in render.RADII:
        shift = np.broadcast_to(shifts, (len(SHAPES), *shifts.shape))
        still = np.asarray(covers(radius, np.zeros_like(shift)))[:, 0]
        centroid = np.stack([still.sum(2) @ line, still.sum(1) @ line], 1)
        centroid /= still.sum((1, 2))[:, None]
        sharp = np.asarray(covers(radius, shift - centroid[:, None]))
        kinds.append(np.stack([blur @ sharp @ blur.T for blur in blurs], 1))
    templates = np.stack(kinds, 1)  # (shape, size, sharp, phase, y, x)
    flat = templates.reshape(-1, WINDOW**2).astype(np.float32)
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / norms[:, None]
    basis = np.linalg.eigh(unit.T @ unit)[1][:, -RANK:].T
    return basis, unit @ basis.T, norms


def smoothing(n: int, sigma: float) -> np.ndarray:
    """Matrix (n, n) that blurs along one axis; rows sum to 1, so borders stay as bright."""
    i = np.arange(n)
    kernel = np.exp(-((i[:, None] - i) ** 2) / (2 * sigma**2))
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
