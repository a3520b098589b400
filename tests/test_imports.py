"""The house's import order: a module imports only from lower rooms (see ORDER), lowest first."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# rooms of one line do not import each other unless ALLOWED says so
ORDER = (
    ("clvr_jax", "clvr_jax.typing"),
    ("clvr_jax.tree",),
    (
        "clvr_jax.parallel",
        "clvr_jax.weights",
        "clvr_jax.statistics",
        "clvr_jax.diffusion",
        "clvr_jax.data",
    ),
    ("clvr_jax.checkpoint", "clvr_jax.lora", "clvr_jax.kernels", "clvr_jax.report"),
    ("clvr_jax.models", "clvr_jax.train"),
    ("clvr_jax.generate",),
    ("clvr_jax.backends",),
    ("clvr_jax.closed_loop", "clvr_jax.miniature", "clvr_jax.serving", "clvr_jax.sft"),
    ("conversion",),
    ("launch",),
)
# of what lies below it, models may use only these
MODELS_MAY = {"clvr_jax.typing", "clvr_jax.tree", "clvr_jax.kernels", "clvr_jax.parallel"}
# and training knows no model, no data and no equations of diffusion
TRAIN_MAY = {"clvr_jax.typing", "clvr_jax.tree", "clvr_jax.parallel", "clvr_jax.checkpoint"}
# third-party packages with one home
HOMES = {
    "flax.linen": "clvr_jax.models",
    "orbax": "clvr_jax.checkpoint",
    "torch": "launch.bench",  # the peer of the benchmark, imported when asked for
    "diffusers": "launch.bench",
    "grain": "clvr_jax.data",
    "array_record": "clvr_jax.data",
    "pyarrow": "clvr_jax.data",
}


def room_of(module: str) -> str | None:
    rooms = [room for line in ORDER for room in line]
    inside = [r for r in rooms if module == r or (module.startswith(r + ".") and r != "clvr_jax")]
    return max(inside, key=len) if inside else None


def files() -> list[Path]:
    return [f for top in ("clvr_jax", "conversion", "launch") for f in (ROOT / top).rglob("*.py")]


@functools.cache
def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the room"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_rooms(file):
    own = room_of(name_of(file))
    assert own is not None, f"{file} lies in no room of ORDER; add it to the design's order"
    level = next(i for i, line in enumerate(ORDER) if own in line)
    for imported in imports(file):
        room = room_of(imported)
        if room is None or room == own:
            continue
        other = next(i for i, line in enumerate(ORDER) if room in line)
        assert other < level, f"{file.relative_to(ROOT)} ({own}) imports {imported} ({room})"
        if own == "clvr_jax.models":
            assert room in MODELS_MAY, f"{file.relative_to(ROOT)} may not import {imported}"
        if own == "clvr_jax.train":
            assert room in TRAIN_MAY, f"{file.relative_to(ROOT)} may not import {imported}"


@pytest.mark.parametrize("package,home", HOMES.items())
def test_some_packages_have_one_home(package, home):
    for file in files():
        uses = any(i == package or i.startswith(package + ".") for i in imports(file))
        name = name_of(file)
        assert not uses or name == home or name.startswith(home + "."), f"{name} uses {package}"


def test_configs_import_only_ml_collections():
    for file in (ROOT / "configs").glob("*.py"):
        assert all(i.startswith("ml_collections") for i in imports(file)), file


def test_running_needs_no_torch_and_no_tensorflow():
    code = (
        "import sys, launch.build, launch.generate, conversion.cli, clvr_jax.checkpoint\n"
        "found = {'torch', 'tensorflow', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "launch",
        "launch.data",
        "launch.evaluate",
        "launch.miniature",
        "launch.generate",
        "launch.train",
        "launch.toy",
        "launch.benchmark",
        "launch.compile",
        "launch.validate_kernels",
        "conversion",
        "conversion.lora",
    ],
)
def test_help_answers_without_heavy_imports(command):
    args = [] if command == "launch" else ["--help"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{args!r}]\n"
        "try:\n"
        f"    runpy.run_module({command!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n"
        "    pass\n"
        "found = {'jax', 'transformers', 'orbax', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
