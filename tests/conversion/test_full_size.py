"""Synthetic weights of full size through every direction: seconds, MB/s and peak memory.

    python -m pytest -m slow -s tests/conversion/test_full_size.py

klein 4B is whole: 24 GB in the temporary folder, minutes of time. Of klein 9B, Qwen3-8B and
Qwen3-VL-8B, whose tensors are the largest, few layers are enough to find the peak of memory, which
is one tensor's.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS
from clvr_jax.models.qwen3.config import VARIANTS
from clvr_jax.models.qwen3_vl.config import VARIANTS as VLM_VARIANTS
from clvr_jax.tree import count
from clvr_jax.weights import SafetensorsReader, write_safetensors
from conversion.rules import file_specs
from tests.conversion import toy

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2.0  # GiB


def noise(size: int, offset: int) -> np.ndarray:
    """Finite bfloat16 numbers of every sign and many exponents, from a tiled random block."""
    bits = np.resize(np.roll(_BLOCK, offset), size)
    return bits.view(ml_dtypes.bfloat16)


# without the exponent's highest bit no number is infinite or reaches 2
_BLOCK = np.random.default_rng(0).integers(0, 2**16, 1 << 22, dtype=np.uint16) & np.uint16(0xBFFF)


def convert(*arguments: object) -> float:
    """Run the command in a process of its own, print its report, return its peak memory in GiB."""
    command = [sys.executable, "-m", "conversion", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"peak host memory ([\d.]+) GiB", done.stdout)[1])


VLM = VLM_VARIANTS["qwen3_vl_8b"]
CASES = {
    "klein 4B": ("transformer", TRANSFORMER_VARIANTS["klein_4b"]),
    "klein 9B, few layers": (
        "transformer",
        dataclasses.replace(TRANSFORMER_VARIANTS["klein_9b"], double_blocks=1, single_blocks=2),
    ),
    "Qwen3-8B, few layers": ("text_encoder", dataclasses.replace(VARIANTS["qwen3_8b"], layers=2)),
    "Qwen3-VL-8B, few layers": (
        "vlm",
        dataclasses.replace(
            VLM,
            text=dataclasses.replace(VLM.text, layers=3),
            vision=dataclasses.replace(VLM.vision, layers=3, deepstack=(0, 1, 2)),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_full_size_in_bounded_memory(case):
    part = toy.component(*CASES[case])
    needed = 3.05 * 2 * count(part.abstract())
    print(f"\n{case}: {needed / 3.05e9:.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        free = shutil.disk_usage(place).free
        if free < needed:
            pytest.skip(f"needs {needed / 1e9:.0f} GB in {place}, {free / 1e9:.0f} GB are free")
        shapes = file_specs(part.table("diffusers"), part.abstract())
        specs = {name: (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()}
        tensors = (
            (name, noise(int(np.prod(shape)), 977 * i).reshape(shape))
            for i, (name, shape) in enumerate(shapes.items())
        )
        source = place / "diffusers"
        source.mkdir()
        write_safetensors(source, specs, tensors, stem=part.kind.stem)
        (source / "config.json").write_text(json.dumps(part.kind.to_json(part.config)))

        ours, single, back = place / "ours", place / "bfl.safetensors", place / "back"
        peaks = [convert(source, ours)]
        if "bfl" in part.kind.layouts:
            peaks.append(convert(ours, single, "--to=bfl"))
            shutil.rmtree(ours)
            peaks.append(convert(single, back, "--to=diffusers"))
        else:
            peaks.append(convert(ours, back))
        first, last = SafetensorsReader(source), SafetensorsReader(back / part.name)
        assert first.tensors.keys() == last.tensors.keys()
        for name in first.tensors:
            before, after = (reader.read(name).view(np.uint16) for reader in (first, last))
            assert np.array_equal(before, after), name
            first.release()
            last.release()
    assert max(peaks) < LIMIT, peaks
