"""Parity tests need the reference implementations; without the extra `parity` they are skipped."""

import pytest

try:
    import diffusers  # noqa: F401
    import torch
except ModuleNotFoundError as error:
    _MISSING = error.name
else:
    _MISSING = None
    torch.set_num_threads(1)  # the cores are shared with XLA and with other test workers


class _Skipped(pytest.Module):
    """A test file that is not imported."""

    def collect(self):
        """Skip, saying what to install."""
        pytest.skip(
            f"{_MISSING} is not installed; parity tests compare with torch and diffusers: "
            "pip install -e '.[parity]'",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path, parent):
    """Put a skip in the place of every file of this folder when a reference is missing."""
    return _Skipped.from_parent(parent, path=module_path) if _MISSING else None


def pytest_terminal_summary(terminalreporter):
    """Print the largest error of every test (in one process: -n 0)."""
    if _MISSING:
        return
    from tests.parity.reference import MEASURED

    if MEASURED:
        terminalreporter.section("largest relative error, and its limit")
    for test, (value, limit) in MEASURED.items():
        terminalreporter.line(f"{value:9.2e}  {limit:8.2e}  {test}")
