"""What ran and on what: versions, device, its limits, memory."""

import datetime
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# vendors' data sheets: bfloat16 dense TFLOP/s, memory TB/s
PEAKS = {
    "NVIDIA H20": (148.0, 4.0),
    "NVIDIA H100": (989.0, 3.35),
    "NVIDIA H200": (989.0, 4.8),
    "TPU v5 lite": (197.0, 0.82),
    "TPU v5e": (197.0, 0.82),
    "TPU v6 lite": (918.0, 1.64),
    "TPU v6e": (918.0, 1.64),
}
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "diffusers",
    "transformers",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def environment(module: str) -> dict[str, Any]:
    """Return what a result file says about the run; `module` is the command's module."""
    import jax

    device = jax.devices()[0]
    return {
        "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.platform == "gpu"
        else None,
        "cudnn": _cudnn() if device.platform == "gpu" else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
    }


def versions(environment: Mapping[str, Any]) -> str:
    """Return the packages of an environment as words: "jax 0.10.2, flax 0.12.8"."""
    return ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


def limits(dtype) -> dict[str, Any]:
    """Return the vendor's peak, where known, and the matmul rate measured here, in TFLOP/s."""
    import jax
    import jax.numpy as jnp

    kind = jax.devices()[0].device_kind
    peak, bandwidth = limits_of(kind)
    if jnp.dtype(dtype) != jnp.bfloat16:
        peak = None  # the table is for bfloat16
    measured = _matmul_rate(dtype)
    return {
        "peak_tflops": peak,
        "memory_tb_s": bandwidth,
        "measured_matmul_tflops": round(measured, 3),
        "limit_tflops": peak or measured,
        "limit_is": f"vendor peak of {kind}, bfloat16" if peak else "matmul rate measured here",
    }


def memory_rate() -> dict[str, Any]:
    """Return the vendor's memory bandwidth, where known, and the reading rate measured here."""
    import jax
    import jax.numpy as jnp

    from launch.bench.timing import timed

    nominal = limits_of(jax.devices()[0].device_kind)[1]
    count = 2**26 if jax.default_backend() == "cpu" else 2**30
    x = jnp.ones(count, jnp.float32)
    read = jax.jit(jnp.max)  # a maximum reads everything and writes nothing
    timed(lambda: read(x))
    best = min(timed(lambda: read(x))[0] for _ in range(10))
    measured = 4 * count / best / 1e9
    return {
        "measured_read_gb_s": round(measured, 1),
        "limit_gb_s": 1e3 * nominal if nominal else measured,
        "bandwidth_is": "vendor peak" if nominal else "reading rate measured here",
    }


def limits_of(kind: str) -> tuple[float | None, float | None]:
    """Return the vendor's bfloat16 TFLOP/s and memory TB/s of a device kind, None if unknown."""
    # the longest name first: "NVIDIA H200" begins with "NVIDIA H20"
    names = sorted(PEAKS, key=len, reverse=True)
    return next((PEAKS[name] for name in names if kind.startswith(name)), (None, None))


def memory() -> dict[str, float]:
    """Return GB in use and at peak: of the device where it says so, else of this process."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats:
        return {
            "device_in_use_gb": round(stats["bytes_in_use"] / 1e9, 3),
            "device_peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 3),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"host_peak_gb": round(peak / 1e9, 3)}


def _matmul_rate(dtype) -> float:
    """TFLOP/s of a square product, the best of a few calls."""
    import jax

    from launch.bench.timing import timed

    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.uniform(jax.random.key(0), (side, side), dtype, -1, 1)
    product = jax.jit(lambda a, b: a @ b)
    timed(lambda: product(a, a))
    best = min(timed(lambda: product(a, a))[0] for _ in range(12))
    return 2 * side**3 / best / 1e12


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn() -> int | None:
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cudnn_get_version()
    except (ImportError, AttributeError, RuntimeError):
        return None


def _output(*command: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=root)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
