"""`python -m launch.generate` as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import pictures, toy
from tests import QUICK_COMPILE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "toy"
    toy.write(folder)
    return folder


def command(*flags):
    environment = os.environ | {"XLA_FLAGS": QUICK_COMPILE}
    args = [sys.executable, "-m", "launch.generate", *flags]
    return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_pictures_metadata_grid_and_settings(weights, tmp_path):
    Image.new("RGB", (70, 100), "red").save(tmp_path / "ref.png")
    done = command(
        f"--weights={weights}",
        "--prompt=a red cup",
        "--prompt=two, of them",
        f"--image={tmp_path / 'ref.png'}",
        "--seeds=3,5",
        "--config.height=64",
        "--config.width=96",
        "--config.batch=2",
        f"--out={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == [
        "0000-a-red-cup-3.png",
        "0001-a-red-cup-5.png",
        "0002-two-of-them-3.png",
        "0003-two-of-them-5.png",
        "grid.png",
        "settings.json",
    ]
    image = Image.open(tmp_path / "out" / "0003-two-of-them-5.png")
    assert image.size == (96, 64)
    assert image.text["prompt"] == "two, of them" and image.text["seed"] == "5"
    settings = json.loads(image.text["settings"])
    assert settings["steps"] == 4 and settings["guidance"] == 1.0  # the toy says it is distilled
    run = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert run["files"] == files[:5] and run["weights"] == image.text["weights"]
    assert done.stdout.strip() == str(tmp_path / "out" / "grid.png")


def test_an_edit_has_the_size_of_its_first_reference(weights, tmp_path):
    Image.new("RGB", (100, 70), "red").save(tmp_path / "ref.png")
    flags = [f"--weights={weights}", "--prompt=x", f"--image={tmp_path / 'ref.png'}", "--dry_run"]
    both = 2 * (64 // 16) * (96 // 16)  # the picture and the reference, cut to 64 x 96
    assert f"512 text + {both} image tokens" in command(*flags).stdout
    done = command(*flags, "--config.height=128")
    assert f"512 text + {8 * 6 + both // 2} image tokens" in done.stdout


def test_dry_run_prints_sizes_and_writes_nothing(weights, tmp_path):
    out = tmp_path / "out"
    done = command(f"--weights={weights}", "--prompt=x", "--dry_run", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "transformer: 471,264 parameters" in done.stdout
    assert "512 text + 4096 image tokens" in done.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--prompt=x", "--config.stepz=3"], 'Did you mean "steps"'),
        (["--prompt=x", "--image=/no/such.png"], "reference image /no/such.png does not exist"),
        (["--prompt=x", "--config.width=1000"], "positive multiples of 16"),
        (["--prompt=x", "--config.text_tokens=700"], "choose from 512, 1024, 2048"),
        (["--prompt=x", "--seeds=-1"], "give numbers from 0"),
        ([], "no prompt was given"),
        (["--prompt=x", "--mode=loop"], "give either --vlm=FOLDER or --server=URL"),
        (["--prompt=a ring", "--vlm=teacher", "--image=README.md"], "--image is for --mode=single"),
        (
            ["--prompt=a ring", "--vlm=teacher", "--config.loop.generations=0"],
            "must be above 0",
        ),
        (["--prompt=x", "--resume"], "--resume is for modes that ask a model"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(weights, tmp_path, flags, message):
    done = command(f"--weights={weights}", *flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_never_mixes_with_an_older_one(weights, tmp_path):
    (tmp_path / "old.txt").write_text("mine")
    done = command(f"--weights={weights}", "--prompt=x", f"--out={tmp_path}")
    assert done.returncode == 1 and "choose another --out" in done.stderr


@pytest.mark.parametrize(
    "prompts,seeds,size,expected",
    [
        (3, 1, 2, [(2, 1), (1, 1)]),
        (2, 3, 2, [(1, 2), (1, 1), (1, 2), (1, 1)]),
        (3, 2, 4, [(2, 2), (1, 2)]),
    ],
)
def test_batches_hold_at_most_the_size_and_every_picture_once(prompts, seeds, size, expected):
    names = [f"p{i}" for i in range(prompts)]
    made = list(pictures.batches(names, list(range(seeds)), size))
    assert [(len(b.prompts), len(b.seeds)) for b in made] == expected
    pairs = [(p, s) for b in made for p in b.prompts for s in b.seeds]
    assert sorted(pairs) == [(p, s) for p in names for s in range(seeds)]


def test_a_picture_that_fails_to_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        pictures.write_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.float64), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_loop_draws_shows_and_goes_on(tmp_path):
    """The shipped klein, directed by the scripted teacher."""
    out = tmp_path / "out"
    flags = [
        *("--weights=miniature", "--vlm=teacher", "--prompt=a red circle", f"--out={out}"),
        *("--prompt=three blue stars", "--config.steps=2", "--config.loop.generations=2"),
    ]
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "index.html")
    names = ["0000-a-red-circle-0", "0001-three-blue-stars-0"]
    assert all((out / name / "index.html").exists() for name in names)
    assert "2/2 " in done.stderr
    trajectory = json.loads((out / names[1] / "trajectory.json").read_text())
    assert trajectory["outcome"] in ("stopped", "generations") and len(trajectory["steps"]) <= 2
    with Image.open(out / names[1] / "1.png") as picture:
        assert picture.size == (64, 64), "the weights say how large their pictures are"
    assert "--resume" in command(*flags).stderr
    again = command(*flags, "--resume")
    assert again.returncode == 0 and "2/2" not in again.stderr
    for mode in ("best_of", "rewrite"):
        other = f"--out={tmp_path / mode}"
        done = command(*flags[:3], f"--mode={mode}", "--config.steps=2", other)
        assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "best_of" / names[0] / "trajectory.json").read_text())
    assert len(best["steps"]) == 4
