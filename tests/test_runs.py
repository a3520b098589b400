"""Checkpoints of runs: what is kept, other meshes, kills, broken and full disks."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clvr_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Keep,
    delete,
    open_state,
    saved_steps,
)
from clvr_jax.parallel import make_mesh

ROOT = Path(__file__).parents[1]


def tree(value=1.0):
    return {"step": jnp.int32(3), "params": {"model": {"x": {"kernel": jnp.full((8, 4), value)}}}}


def abstract(state, sharding=None):
    place = lambda x: sharding if x.ndim and sharding is not None else x.sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def test_what_the_rules_keep(tmp_path):
    checkpoints = Checkpoints(tmp_path, Keep(last=2, every=4, best=1))
    for step in range(1, 10):
        checkpoints.save(step, tree(), {"step": step}, {"loss": abs(step - 3)})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 8, 9]
    assert checkpoints.meta() == (9, {"step": 9})
    assert checkpoints.meta(3) == (3, {"step": 3})
    checkpoints.close()


def test_a_metric_that_is_missing_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, Keep(last=1, best=1, metric="validation_loss"))
    checkpoints.save(1, tree(), {}, {"validation_loss": 5.0})
    checkpoints.save(2, tree(), {}, {"loss": 0.0})
    checkpoints.save(3, tree(), {"x": 1}, {"validation_loss": float("nan")})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    checkpoints.save(4, tree(), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4]
    checkpoints.close()


def test_restored_on_another_mesh(tmp_path):
    whole = make_mesh({"fsdp": 8})
    placed = NamedSharding(whole, PartitionSpec("fsdp"))
    state = tree()
    kernel = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(8, 4), placed)
    state["params"]["model"]["x"]["kernel"] = kernel
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    other = NamedSharding(
        make_mesh({"tensor": 2}, jax.devices()[:2]), PartitionSpec(None, "tensor")
    )
    single = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    for sharding in (other, single):
        back = checkpoints.restore(1, abstract(state, sharding))["params"]["model"]["x"]["kernel"]
        assert back.sharding == sharding
        np.testing.assert_array_equal(back, kernel)
    checkpoints.close()


def test_leaves_are_read_without_devices(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(2.0), {})
    checkpoints.close()
    reader = open_state(tmp_path)
    assert (reader.read("params/model/x/kernel", (slice(0, 2), slice(0, 4))) == 2).all()


def test_another_state_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(), {})
    other = tree()
    other["params"]["lora"] = {"x": {"a": jnp.zeros((8, 2))}}
    other["params"]["model"]["x"]["kernel"] = jnp.zeros((8, 5))
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, abstract(other))
    text = str(error.value)
    assert "missing: params/lora/x/a (8, 2)" in text
    assert "params/model/x/kernel is (8, 4), asked for as (8, 5)" in text
    assert "resume with the config it was made with" in text
    with pytest.raises(CheckpointError, match="no checkpoint of step 7, only 1"):
        checkpoints.restore(7, abstract(other))
    checkpoints.close()
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        Checkpoints(tmp_path / "empty").meta()
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        open_state(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7, only 1"):
        open_state(tmp_path, 7)
    assert not (tmp_path / "nothing").exists()


def test_a_broken_checkpoint_names_itself_and_the_others(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(), {})
    checkpoints.wait()
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file() and "METADATA" not in file.name and "manifest" not in file.name:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"2 cannot be read .*take another one: 1"):
        checkpoints.restore(2, abstract(tree()))
    assert checkpoints.restore(1, abstract(tree()))["step"] == 3
    checkpoints.close()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(), {})
    checkpoints.wait()
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"0\.00 GiB free, a checkpoint takes"):
        checkpoints.save(2, tree(), {})
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, tree(), {})
    assert checkpoints.steps() == [1, 3]
    checkpoints.close()


def test_a_disk_that_fills_up_during_a_save(tmp_path):
    """Told by `wait`, leaves nothing behind, and costs the saves after it nothing."""
    checkpoints = Checkpoints(tmp_path)
    noise = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    state = {"x": jnp.asarray(noise)}
    checkpoints.save(1, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # files end there
    try:
        checkpoints.save(2, state, {})
        with pytest.raises(CheckpointError, match=r"the last save failed: .*too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.save(3, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == saved_steps(tmp_path) == [1, 3]
    checkpoints.close()


def test_only_finished_checkpoints_are_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, tree(), {})
    checkpoints.close()
    (tmp_path / "8").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    delete(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"8", "notes.txt"}
    delete(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_killed_while_saving(tmp_path):
    """At any moment of a save: what was finished is whole, the rest is gone at the next start."""
    code = (
        "import sys, jax.numpy as jnp\n"
        "from clvr_jax.checkpoint import Checkpoints, Keep\n"
        "checkpoints = Checkpoints(sys.argv[1], Keep(last=100))\n"
        "state = {'step': jnp.int32(0), 'params': {'x': jnp.ones((1024, 1024))}}\n"
        "for step in range(10_000):\n"
        "    checkpoints.save(step, state, {'step': step})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(4):
        process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    begun = max([3, *map(int, rest.split())])
    process.wait(30)
    checkpoints = Checkpoints(tmp_path)
    steps = checkpoints.steps()
    # `save` waits for the one before, so only the last one or the one being begun may be lost
    assert steps[-1] >= begun - 1
    state = {"step": jnp.int32(0), "params": {"x": jnp.ones((1024, 1024))}}
    for step in steps:
        assert (checkpoints.restore(step, abstract(state))["params"]["x"] == 1).all()
    assert not list(tmp_path.glob("*tmp*"))
    checkpoints.close()
