# ruff: noqa: E402  (the environment is read when jax is imported)
"""Settings every test runs under: eight simulated CPU devices, a compile cache, no network."""

import os
from pathlib import Path

from tests import QUICK_COMPILE

os.environ["JAX_PLATFORMS"] = os.environ.get("CLVR_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE} --xla_force_host_platform_device_count=8"
).strip()
_ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch and BLAS leave the cores to XLA
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

from clvr_jax.parallel import make_mesh


@pytest.fixture(scope="session")
def mesh_2x2x2() -> jax.sharding.Mesh:
    """A mesh data=2, fsdp=2, tensor=2 over the eight simulated devices."""
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
