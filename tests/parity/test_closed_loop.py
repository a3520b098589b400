"""The closed loop, by its command, over folders that diffusers and transformers have saved."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.detect import CONDITIONING, find
from tests.launch.training import ENV, ROOT

pytestmark = pytest.mark.slow
PROMPTS = ("two red stars", "a blue ring and a black cross", "three green circles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The miniature's models, read and saved by the libraries; the image model has no record."""
    place = tmp_path_factory.mktemp("saved")
    klein, vlm = find("miniature").path, find("miniature-vlm").path
    Flux2KleinPipeline.from_pretrained(klein).save_pretrained(place / "klein")
    for part in (Qwen3VLForConditionalGeneration, AutoTokenizer, Qwen2VLImageProcessorPil):
        part.from_pretrained(vlm).save_pretrained(place / "vlm")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


def draw(folder, out, klein, vlm, *flags):
    """What came of every prompt: its record, its trajectory's steps, and its pictures."""
    command = [
        *(sys.executable, "-m", "launch.generate", f"--weights={klein}", f"--vlm={vlm}"),
        *("--vlm_config=configs/vlm.py:greedy", f"--prompts_file={folder / 'prompts.txt'}"),
        *("--config.height=64", "--config.width=64", "--config.steps=8", "--config.dtype=float32"),
        *("--config.loop.generations=2", f"--out={folder / out}", *flags),
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    made = []
    for file in sorted((folder / out).glob("*/result.json")):
        steps = json.loads(file.with_name("trajectory.json").read_text())["steps"]
        shown = [np.asarray(Image.open(file.with_name(s["image"])), np.int16) for s in steps]
        made.append((json.loads(file.read_text()), steps, shown))
    assert len(made) == len(PROMPTS), done.stderr[-3000:]
    return made


def test_trained_weights_in_the_released_layouts_draw_as_ours_do(folder):
    """The record of how the image model was trained is all that the libraries do not save."""
    trained = folder / "trained"
    shutil.copytree(folder / "klein", trained)
    shutil.copyfile(find("miniature").path / CONDITIONING, trained / CONDITIONING)
    found = draw(folder, "theirs", trained, folder / "vlm")
    for (known, steps, shown), (_, expected, pictures) in zip(
        found, draw(folder, "ours", "miniature", "miniature-vlm"), strict=True
    ):
        assert known["about"]["system"].startswith("control ") and known["error"] is None
        said = [[step[name] for name in ("reasoning", "action")] for step in steps]
        assert said == [[step[name] for name in ("reasoning", "action")] for step in expected]
        for picture, other in zip(shown, pictures, strict=True):
            assert np.abs(picture - other).max() <= 1


def test_stock_weights_get_the_prompt_that_explains_their_part(folder):
    """A language model that never saw it: what it says is not to be expected, that it ends is."""
    for known, steps, shown in draw(folder, "stock", folder / "klein", folder / "vlm"):
        assert known["about"]["system"].startswith("stock ")
        assert known["pictures"] == len(shown) == len(steps) > 0
        assert all(step["metadata"]["text"] == step["action"]["prompt"] for step in steps)
