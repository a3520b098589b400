"""What every command does first: compile cache, quiet start, readable errors."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def use_compile_cache() -> Path:
    """Turn on JAX's persistent compile cache; returns its folder.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder than ~/.cache/clvr_jax/xla.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(folder) if folder else Path.home() / ".cache" / "clvr_jax" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print what a user can act on as one message and exit with 1; let bugs show their trace."""
    # absl shows the search for a TPU on machines that have none
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        if os.environ.get("CLVR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
