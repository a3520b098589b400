"""The server as a process: it stops when asked, with its answers finished, and returns."""

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clvr_jax.serving.app import make_app
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.server import serve
from tests.serving.conftest import Running, answer_on, eventually
from tests.serving.fake import FakeVlm

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from clvr_jax.serving.app import make_app
from clvr_jax.serving.limits import Limits
from clvr_jax.serving.server import serve
from tests.serving.conftest import eventually
from tests.serving.fake import FakeVlm
vlm = FakeVlm()
serve(make_app(vlm, Limits(), None), port=int(sys.argv[1]), grace_s=int(sys.argv[2]))
eventually(lambda: not vlm.open)  # what is cancelled ends in a thread of the backend's
print("returned, open:", len(vlm.open), "cancelled:", vlm.cancels)
"""


@contextlib.contextmanager
def program(grace_s):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [sys.executable, "-c", PROGRAM, str(port), str(grace_s)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(args, cwd=ROOT, **pipes)
    try:
        running = Running(FakeVlm(), port)
        eventually(lambda: answers(running), seconds=15.0)
        yield process, running
    finally:
        process.kill()
        process.communicate()


def answers(running):
    with contextlib.suppress(OSError):
        return running.health()["status"] == "ok"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_what_it_answers_and_returns(number):
    with program(grace_s=10) as (process, running):
        connection = running.raw_say("slow 0.1", stream=True)
        received = connection.recv(65536)
        process.send_signal(number)
        received += answer_on(connection)
        assert b"four " in received and b"[DONE]" in received
        printed, _ = process.communicate(timeout=10)
        assert process.returncode == 0, printed
        assert "returned, open: 0 cancelled: 0" in printed


def test_it_cancels_what_takes_longer_than_its_grace():
    with program(grace_s=1) as (process, running):
        connection = running.raw_say("hang")
        eventually(lambda: running.health()["running"] == 1)
        process.send_signal(signal.SIGTERM)
        received = answer_on(connection)
        assert received.startswith(b"HTTP/1.1 503") and b"the server is stopping" in received
        printed, _ = process.communicate(timeout=10)
        assert process.returncode == 0, printed
        assert "returned, open: 0 cancelled: 1" in printed


def test_an_address_that_is_taken_is_an_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1 port {port}"):
            serve(make_app(FakeVlm(), Limits(), None), port=port)
