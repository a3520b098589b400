"""LoRA files of every dialect: `read`, `write`, and the command `python -m conversion.lora`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `read` and `write` on first use, so that the command's --help is fast."""
    if name not in ("read", "write"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from conversion.lora import files

    return getattr(files, name)
