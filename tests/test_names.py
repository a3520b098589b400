"""Every name that is used is there: what the linter cannot be asked, because of shapes.

Its rule for undefined names takes the axes of `Float[Array, "b rows"]` for names; those stand in
strings, all others count.
"""

import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]


def undefined(folder: Path) -> list[str]:
    """Names that no scope has, outside of strings."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821"]
    command += ["--output-format=json", "--exit-zero", "--exclude=.venv", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, strings = [], {}
    for each in json.loads(done.stdout):
        file = Path(each["filename"])
        if file not in strings:
            tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
            strings[file] = [(t.start, t.end) for t in tokens if t.type == tokenize.STRING]
        at = each["location"]["row"], each["location"]["column"] - 1
        if not any(start <= at < end for start, end in strings[file]):
            found.append(f"{file}:{at[0]}: {each['message']}")
    return found


def test_no_name_is_undefined():
    assert not [line for part in ROOT.glob("*/__init__.py") for line in undefined(part.parent)]


def test_an_undefined_name_is_found(tmp_path):
    source = 'def f(x: Float[Array, "b c"]) -> "Float":\n    raise TooLong(x)\n'
    (tmp_path / "a.py").write_text(f"from jaxtyping import Array, Float\n\n\n{source}")
    assert undefined(tmp_path) == [f"{tmp_path / 'a.py'}:5: Undefined name `TooLong`"]
