"""What tests of `python -m launch.train` start it with."""

import os
import sys
from pathlib import Path

from tests import QUICK_COMPILE

ROOT = Path(__file__).parents[2]
ENV = {
    **os.environ,
    "XLA_FLAGS": f"{QUICK_COMPILE} --xla_force_host_platform_device_count=1",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
}


def arguments(folder, stage, workdir, *options):
    """Return the command line that trains the toy weights below `folder` on its data."""
    given = (
        f"weights={folder / ('klein' if stage == 'image' else 'vlm')}",
        f"data.train={folder}/data/trajectories.jsonl",
        "preview.every=0",
        *options,
    )
    return [
        *(sys.executable, "-m", "launch.train", f"--config=configs/{stage}_sft.py:toy"),
        f"--workdir={workdir}",
        *(f"--config.{option}" for option in given),
    ]
