"""Two real processes of `python -m launch.train`: one run, the same numbers as of one process."""

import json
import shutil
import signal
import socket
import subprocess

import numpy as np
import pytest

from clvr_jax.checkpoint import saved_steps
from launch import toy
from launch import toy_data as data
from tests.launch import training
from tests.launch.training import ENV, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy weights and a dataset of single pictures, so that there is one program."""
    place = tmp_path_factory.mktemp("processes")
    toy.write(place / "klein")
    data.make(place / "data", count=6, steps=1, size=(64, 64))
    return place


def command(folder, workdir, *options):
    return training.arguments(
        folder,
        "image",
        workdir,
        f"data.validation={folder}/data/trajectories.jsonl",
        f"data.features={folder}/features",
        "condition.text=instruction",
        "condition.buckets=(96,)",
        "validation.every=2",
        "steps=6",
        "save.every=2",
        "save.last=9",
        "log=1",
        "optim.schedule=cosine",
        *options,
    )


def begin(command, count, **how):
    """Start processes that find one another by plain variables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**ENV, **joined, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def run(command, count=1, code=0):
    """Run to the end; return what each process printed."""
    processes = begin(command, count)
    told = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=280)
            assert process.returncode == code, errors[-3000:]
            told.append((out, errors))
    finally:
        for process in processes:
            process.kill()
    return told


def losses(workdir):
    """(step, name) to number, of losses; fails where a step was written twice."""
    found = {}
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        for name in ("loss", "grad_norm", "validation_loss"):
            if name in line:
                assert (line["step"], name) not in found
                found[line["step"], name] = line[name]
    return found


def agree(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[key] for key in a], [b[key] for key in a], rtol=1e-5)


@pytest.fixture(scope="module")
def alone(folder):
    """Losses of one process with both rows; makes the features, which several would not."""
    run(command(folder, folder / "alone", "batch.rows=2"))
    return losses(folder / "alone")


@pytest.fixture(scope="module")
def together(folder, alone):
    """A run by two processes of one device each."""
    told = run(command(folder, folder / "together"), count=2)
    return folder / "together", told


@pytest.mark.slow
def test_losses_are_those_of_one_process_and_written_once(alone, together):
    workdir, told = together
    agree(losses(workdir), alone)
    assert {step for step, _ in alone} == {0, 1, 2, 3, 4, 5, 6}
    assert [str(workdir) in out for out, _ in told] == [True, False]
    assert "step 6/6" in told[0][1] and "step 6/6" not in told[1][1]
    record = json.loads((workdir / "run.json").read_text())
    assert [start["processes"] for start in record["starts"]] == [2]


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_saved(folder, alone, together, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    ((_, told),) = run([*command(folder, workdir, "batch.rows=2"), "--resume"])
    assert "resumed at step 2 of 6" in told
    agree(losses(workdir), alone)
    # the parameters a run ends with lie within what Adam makes of the rounding of two meshes
    from conversion import detect

    ours, theirs = (
        np.asarray(detect.find(place).components["transformer"].open().read("img_in/kernel", None))
        for place in (workdir, folder / "alone")
    )
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.slow
def test_another_number_of_rows_is_refused_by_name(folder, together, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    ((_, told),) = run([*command(folder, workdir, "batch.rows=3"), "--resume"], code=1)
    assert "batch.rows x mesh.data x mesh.fsdp) was [1, 2] and is [1, 3]" in told


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_both(folder, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = begin(command(folder, workdir, "steps=100000", "save.every=0"), 2)
    try:
        for line in processes[0].stderr:
            if line.startswith("step 2/"):
                processes[1].send_signal(signal.SIGTERM)
                break
        told = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [143, 143], told
    finally:
        for process in processes:
            process.kill()
    (step,) = saved_steps(workdir / "checkpoints")
    assert all(f"told to end at step {step}; the state is saved" in text for text in told)
    assert max(at for at, _ in losses(workdir)) == step
