"""What every command does first: compile cache, quiet start, readable errors."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


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
def compile_seconds() -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds JAX has spent compiling since."""
    import jax

    spent = [0.0]

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: spent[0]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def config_flag(file: str, name: str = "config") -> Any:
    """Define --config, or another name, with a file in configs/ as its default.

    An unknown key, type or variant is one line that names the nearest key, not a trace.
    """
    from ml_collections import config_flags

    default = Path(__file__).parents[1] / "configs" / file
    try:
        return config_flags.DEFINE_config_file(name, str(default), "FILE.py[:variant]")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error).replace("\\n", "\n").replace("\\'", "'").strip("\"'")
        print(f"error: --{name}:", " ".join(text.split()), file=sys.stderr)
        sys.exit(1)


def run(main: Callable[[list[str]], None]) -> None:
    """Parse the flags and call `main`."""
    from absl import app

    def quietly(argv: list[str]) -> None:
        from absl import logging

        # Orbax tells of every file that it writes
        if not any(flag.lstrip("-").startswith(("verbosity", "v=")) for flag in sys.argv):
            logging.set_verbosity(logging.WARNING)
        main(argv)

    with readable_errors():
        app.run(quietly)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Print what a user can act on as one message and exit with 1; let bugs show their trace."""
    # absl shows the search for a TPU on machines that have none
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
        yield
    except BrokenPipeError:  # the reader of our output left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("CLVR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
