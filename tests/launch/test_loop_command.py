"""The closed loop as a user runs it, with the miniature's weights and its scripted teacher."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.miniature import detect
from clvr_jax.miniature.teacher import Policy, Teacher
from clvr_jax.serving.app import make_app
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.server import make_server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROMPTS = (
    "a red circle and a blue square",
    "three green stars",
    "a ring above a cross",
    "a large purple triangle in the top left corner",
    "a small yellow ring",
    "two black crosses and an orange star",
)


def command(folder: Path, out: str, *flags: str) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    given = ["--weights=miniature", f"--prompts_file={prompts}", f"--out={folder / out}"]
    options = ["--config.loop.generations=3", "--config.steps=8", *flags]
    return [sys.executable, "-m", "launch.generate", *given, *options]


def run(folder: Path, out: str, *flags: str) -> dict:
    subprocess.run(command(folder, out, *flags), cwd=ROOT, check=True, capture_output=True)
    return stories(folder / out)


def stories(out: Path) -> dict:
    """What was decided for each prompt, and the pictures of it."""
    found = {}
    for file in sorted(out.glob("*/trajectory.json")):
        record = json.loads(file.read_text())
        said = [(s["reasoning"], s["action"], s["critique"], s["verdict"]) for s in record["steps"]]
        pictures = [
            np.asarray(Image.open(file.parent / s["image"]), np.int16) for s in record["steps"]
        ]
        found[record["goal"]] = (said, record["outcome"], record["final"]), pictures
    return found


def assert_same(found: dict, expected: dict) -> None:
    """The same decisions, and pictures that differ by rounding at most."""
    assert set(found) == set(expected) == set(PROMPTS)
    for goal, (decided, pictures) in expected.items():
        assert found[goal][0] == decided, goal
        for picture, other in zip(found[goal][1], pictures, strict=True):
            assert np.abs(picture - other).max() <= 1, goal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def together(folder):
    """Every prompt at once, with a model here."""
    return run(folder, "together", "--vlm=teacher", "--config.loop.concurrency=6")


def test_one_by_one_is_as_all_together(folder, together):
    alone = ["--config.loop.concurrency=1", "--config.batch=1"]
    assert_same(run(folder, "alone", "--vlm=teacher", *alone), together)
    assert any(len(pictures) > 1 for _, pictures in together.values())


def test_a_killed_run_goes_on_to_the_same_end(folder, together):
    given = command(folder, "killed", "--vlm=teacher", "--config.loop.concurrency=1")
    process = subprocess.Popen(given, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = folder / "killed"
    for _ in range(3000):
        if process.poll() is not None or len(list(killed.glob("*/result.json"))) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
    done = {file: file.stat().st_mtime_ns for file in killed.glob("*/result.json")}
    assert 2 <= len(done) < len(PROMPTS)
    subprocess.run([*given, "--resume"], cwd=ROOT, check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in done} == done  # not drawn again
    assert_same(stories(killed), together)
    assert not list(killed.glob("*.partial"))


class Unreliable:
    """An application that drops every fifth call, half of them before and half of them after."""

    def __init__(self, app):
        self.app, self.calls, self.failed = app, 0, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            return await self.app(scope, receive, send)
        self.calls += 1
        if self.calls % 5:
            return await self.app(scope, receive, send)
        self.failed += 1
        if self.failed % 2:
            start = {"type": "http.response.start", "status": 503, "headers": []}
            await send(start)
            return await send({"type": "http.response.body", "body": b"overloaded"})

        async def lost(message):
            if message["type"] == "http.response.body":
                raise ConnectionResetError("the connection is gone")
            await send(message)

        await self.app(scope, receive, lost)


def test_a_remote_model_that_often_fails_loses_nothing(folder, together):
    """This repository's own server, with a fifth of the calls failing."""
    teacher = Teacher(0, Policy(), detect.detect)
    app = Unreliable(make_app(teacher, Limits(), None))
    server = make_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            remote = [f"--server={url}", f"--name={teacher.name}", "--config.loop.concurrency=6"]
            found = run(folder, "remote", *remote)
        finally:
            server.should_exit = True
            thread.join()
    assert app.failed >= 3, f"{app.failed} of {app.calls} calls failed"
    assert_same(found, together)
