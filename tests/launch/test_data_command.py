"""`python -m launch.data` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clvr_jax.data.sources import open_source
from launch import data
from launch.toy_data import make

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toy(tmp_path):
    return make(tmp_path / "toy", 3, (1, 2))


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Run the command in this process: its status, output and errors."""
    try:
        status = data.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_needs_no_heavy_imports():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        "    runpy.run_module('launch.data', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit(bool({'jax', 'numpy', 'pydantic', 'rich', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "inspect" in done.stdout


@pytest.mark.parametrize("name", ["a.array_record", "a.jsonl"])
def test_a_full_disk_is_one_line_and_leaves_nothing(toy, tmp_path, name):
    command = [sys.executable, "-m", "launch.data", "convert", toy, tmp_path / "out" / name]
    limited = ["bash", "-c", 'ulimit -f 1 && exec "$@"', "limited", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


def test_nothing_needs_jax(toy):
    code = (
        "import sys\n"
        "from launch import data\n"
        f"status = data.main(['validate', {str(toy)!r}, '--full'])\n"
        "sys.exit(status or ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 records, 4 images: no faults\n"


def test_validate_prints_every_fault_and_exits_with_1(toy, capsys):
    (toy.parent / "toy-1" / "2.png").unlink()
    lines = toy.read_text().splitlines()
    toy.write_text("\n".join([*lines, "{"]))
    status, out, err = call(capsys, "validate", toy)
    assert status == 1 and err == "4 records, 4 images: 2 faults in 2 places\n"
    assert out.splitlines() == [
        f"{toy}:2: image 2 (toy-1/2.png) does not exist",
        f"{toy}:4: is no JSON: Expecting property name enclosed in double quotes (column 2)",
    ]
    status, out, _ = call(capsys, "validate", toy, "--min_side=65", "--max_aspect=1.2")
    assert status == 1 and len(out.splitlines()) == 5


def test_inspect_shows_a_record(toy, capsys):
    status, out, _ = call(capsys, "inspect", toy, "--index=1")
    assert status == 0
    made = open_source(toy)[1]
    assert out.startswith(f"toy-1  ({toy}:2)\n") and made.goal in out
    unfolded = "".join(out.split())  # long paths are folded
    assert "edit of image 1" in out and f"{made.steps[1].image},96x64" in unfolded
    Path(made.steps[1].image).unlink()
    assert "cannot be read (validate" in call(capsys, "inspect", toy, "--id=toy-1")[1]


def test_inspect_shows_the_conversation(toy, capsys):
    _, out, _ = call(capsys, "inspect", toy, "--conversation")
    made = open_source(toy)[0]
    assert out == (
        f"--- user\n{made.goal}\n"
        f"--- assistant\n{made.steps[0].reasoning}\n{made.steps[0].action.line()}\n<IMG_GEN_1>\n"
        f"--- user\n[image 1: {made.steps[0].image}]\n"
        f'--- assistant\n{made.closing}\n{{"action": "stop"}}\n'
    )


@pytest.mark.parametrize("policy", ["text=instruction,references=chosen", "JSON"])
def test_inspect_shows_a_condition(toy, capsys, policy):
    if policy == "JSON":
        policy = '{"text": "instruction", "references": "chosen"}'
    _, out, _ = call(capsys, "inspect", toy, "--index=1", "--step=2", f"--policy={policy}")
    made = open_source(toy)[1]
    text = made.steps[1].action.prompt.replace("<IMG_GEN_1>", "image 1")
    assert out.endswith(
        f"--- text\n{text}\n\n--- references\n1: image 1, T = 10, {made.steps[0].image}\n\n"
        f"--- target\n{made.steps[1].image}\n"
    )


def test_stats(toy, capsys):
    status, out, _ = call(capsys, "stats", toy)
    assert status == 0 and "3 trajectories" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["steps", "1", "2", "66.7%"] in rows and ["", "2", "1", "33.3%"] in rows
    assert ["action", "generate", "3", "75.0%"] in rows
    assert ["references", "0", "3", "75.0%"] in rows
    assert ["", "96x64", "2", "50.0%"] in rows or ["image size", "96x64", "2", "50.0%"] in rows
    assert f"fingerprint {open_source(toy).fingerprint}" in out


def test_convert_there_and_back(toy, tmp_path, capsys):
    packed, back = tmp_path / "out" / "a.array_record", tmp_path / "out" / "b.jsonl"
    status, out, _ = call(capsys, "convert", toy, packed)
    assert status == 0 and out == f"wrote 3 records to {packed}\n"
    assert call(capsys, "convert", packed, back, "--to=messages")[0] == 0
    assert "messages" in json.loads(back.read_text().splitlines()[0])
    assert call(capsys, "validate", back, "--full")[0] == 0
    assert [made.goal for made in open_source(back)] == [made.goal for made in open_source(toy)]
    names = tmp_path / "out" / "names.array_record"
    assert call(capsys, "convert", toy, names, "--paths")[0] == 0
    assert open_source(names)[0] == open_source(toy)[0]
    copied = tmp_path / "copy" / "c.jsonl"
    assert call(capsys, "convert", toy, copied, "--copy_images")[0] == 0
    assert (tmp_path / "copy" / "c_images" / "000001" / "2.png").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["stats", "none.jsonl"], "none.jsonl does not exist"),
        (["inspect", "{toy}", "--index=3"], "record 3 is asked for, there are 3 from 0"),
        (["inspect", "{toy}", "--id=x"], "none of the 3 records has the id 'x'"),
        (["inspect", "{toy}", "--step=2"], "--step=2: the record has the steps 1 to 1"),
        (["inspect", "{toy}", "--policy=chosen"], "'chosen' is not NAME=VALUE"),
        (["inspect", "{toy}", "--policy=refs=all"], "refs: is no field of the schema"),
        (["convert", "{toy}", "x.parquet"], "the name must end in .jsonl or .array_record"),
        (["convert", "{toy}", "{toy}"], "exists; choose another name"),
        (["convert", "{toy}", "x.jsonl", "--paths"], "--paths is for ArrayRecord"),
        (["convert", "{toy}", "x.array_record", "--copy_images"], "--copy_images is for JSONL"),
    ],
)
def test_what_cannot_be_done_is_one_line(toy, capsys, arguments, message):
    status, _, err = call(capsys, *(argument.format(toy=toy) for argument in arguments))
    assert status == 1 and err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1
