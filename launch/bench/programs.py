"""What the compiled denoising loop copies: does the layer scan move weights before using them?"""

import functools
from typing import Any

from clvr_jax.models.flux2.config import STACKED
from clvr_jax.tree import flatten
from launch import hlo
from launch.bench.weights import layer_reader

_WORTH = 2**16  # elements; smaller kernels do not matter


def weight_copies(denoise: functools.partial, params: Any, scan: bool) -> dict[str, Any]:
    """Compile a call of `image.denoise` once more and report its copies of weights, in MB.

    Args:
      denoise: the jitted function with its arguments.
      params: the transformer's parameters.
      scan: whether the layers are scanned.

    Returns:
      For every loop body and for what runs outside loops: iterations (as often as the program runs
      them in one call), MB copied in each, and the largest instructions.
    """
    program = hlo.Program(denoise.func.lower(*denoise.args).compile().as_text())
    kernels = {k: v.shape for k, v in flatten(layer_reader(params, STACKED)[0]).items()}
    kernels = {path: shape for path, shape in kernels.items() if path.endswith("/kernel")}
    layer = lambda path, shape: shape[1:] if path.startswith(STACKED) else shape
    shapes = [layer(path, shape) for path, shape in kernels.items()]
    wholes = [shape for path, shape in kernels.items() if scan and path.startswith(STACKED)]
    worth = lambda shape: functools.reduce(int.__mul__, shape) >= _WORTH
    trips = program.trips()
    report = {}
    for place, copies in hlo.weight_copies(program, filter(worth, [*shapes, *wholes])).items():
        largest = sorted(copies.items(), key=lambda item: -item[1])[:4]
        report["outside loops" if place == program.entry else place] = {
            "iterations": trips.get(place, 1),
            "mb_per_iteration": round(sum(copies.values()) / 1e6, 3),
            "largest_mb": {name: round(size / 1e6, 3) for name, size in largest},
        }
    return report
