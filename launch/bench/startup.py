"""Time from process start to the first picture, without and with a filled compile cache.

A fresh process makes the networks, random weights on the device, and one picture. Reading a
checkpoint is not in it: `python -m launch.generate` prints that time for real weights.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


def measure(case: Any) -> dict[str, Any]:
    """Run a fresh process twice on one cache folder; return seconds since process start by stage.

    Raises:
      RuntimeError: a process failed; its last lines are in the text.
    """
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for label in ("empty_cache", "filled_cache"):
            values = json.dumps(dataclasses.asdict(case))
            command = [sys.executable, "-m", __spec__.name, str(time.time()), values]
            env = {**os.environ, **cache}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                tail = "\n".join(done.stderr.strip().splitlines()[-5:])
                raise RuntimeError(f"the process that was timed failed:\n{tail}")
            report[label] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def _child(start: float, values: dict[str, Any]) -> dict[str, float]:
    """Seconds since `start` at which each stage was done."""
    stages = {}

    def done(stage: str) -> None:
        stages[stage] = round(time.time() - start, 2)

    done("python_s")
    from launch.bench import image

    done("imports_s")
    import jax

    jax.devices()
    done("device_s")
    settings = image.Settings(**values.pop("settings"))
    case = image.Case(settings=settings, **values)
    model = image.build(case)
    done("weights_s")
    image.picture(model, case)
    done("first_image_s")
    image.picture(model, case)
    done("second_image_s")
    return stages


if __name__ == "__main__":
    print(json.dumps(_child(float(sys.argv[1]), json.loads(sys.argv[2]))))
