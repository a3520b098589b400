"""The miniature's training on a GPU and on a CPU: the same losses, within rounding."""

import json
import subprocess
import sys

import numpy as np
import pytest

from launch.recipe import Recipe
from tests.launch.training import ENV, ROOT

STEPS = 20


def losses(folder, variant, platform):
    command = [
        *(sys.executable, "-m", "launch.train", f"--config=configs/miniature.py:{variant}"),
        f"--workdir={folder / platform}",
        f"--config.weights={folder / ('vlm_begin' if variant == 'vlm' else 'begin')}",
        *(f"--config.steps={STEPS}", "--config.log=1", "--config.batch.rows=4"),
    ]
    env = {**ENV, "JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    env["CUDA_VISIBLE_DEVICES"] = "0"  # rows are of a device
    subprocess.run(command, cwd=ROOT, env=env, check=True, stderr=subprocess.DEVNULL)
    lines = (folder / platform / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["klein", "vlm"])
def test_losses_on_a_gpu_are_those_on_a_cpu(tmp_path, variant, monkeypatch):
    """Both in float32; over some steps of a high rate differences of rounding grow."""
    asked = [sys.executable, "-c", "import jax; jax.devices()"]
    env = {**ENV, "JAX_PLATFORMS": "cuda"}
    if subprocess.run(asked, env=env, capture_output=True, check=False).returncode:
        pytest.skip("there is no GPU")
    monkeypatch.chdir(ROOT)
    Recipe(tmp_path).run(["begin", "vlm_begin"])
    cpu, gpu = (losses(tmp_path, variant, platform) for platform in ("cpu", "cuda"))
    assert len(cpu) == STEPS
    np.testing.assert_allclose(gpu[:2], cpu[:2], rtol=1e-4)
    np.testing.assert_allclose(gpu, cpu, rtol=0.02)
