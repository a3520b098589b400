"""The folder of a run, and options that are told before anything is looked at; nothing trains."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.checkpoint import CheckpointError, Checkpoints, saved_steps
from configs import image_sft, vlm_sft
from conversion import runs
from launch.training import compose, folder
from tests.launch.training import ENV, ROOT


def config(**changes):
    made = image_sft.get_config("toy")
    made.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    return made


def save(place, step=1):
    checkpoints = Checkpoints(place)
    checkpoints.save(step, {"params": {"model": {"x": jnp.ones(2)}}}, {})
    checkpoints.close()


def begin(place, given, overwrite=False, **record):
    record = {"component": "transformer", "weights": "base", **record}
    folder.begin(place, given.to_dict(), record, overwrite)


def test_what_may_change_on_resume(tmp_path):
    begin(tmp_path / "run", config())
    resumed = lambda given: folder.prepare(tmp_path / "run", given.to_dict(), True, False)
    resumed(config(batch__rows=2, mesh__fsdp=4, log=3, save__every=7, trackers=("wandb",)))
    for name in ("batch.accumulation", "save.folder", "optim.eps", "dropout", "seed"):
        other = config()
        value = str(tmp_path / "other") if name == "save.folder" else 3
        other.update_from_flattened_dict({name: value if name != "optim.eps" else 0.5})
        with pytest.raises(ValueError, match=f"--config.{name}: the run has"):
            resumed(other)


def test_a_run_that_saved_nothing_begins_anew(tmp_path):
    """Its record and config are those of the start that saves."""
    begin(tmp_path, config(log=1), data="old")
    begin(tmp_path, config(log=2), data="new")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"] == "new" and len(record["starts"]) == 2
    assert json.loads((tmp_path / "config.json").read_text())["log"] == 2
    save(tmp_path / "checkpoints")
    begin(tmp_path, config(log=3), data="newest")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"] == "new" and len(record["starts"]) == 3
    assert json.loads((tmp_path / "config.json").read_text())["log"] == 2


def test_overwrite_deletes_the_states_wherever_they_are(tmp_path):
    elsewhere = tmp_path / "states"
    given = config(save__folder=str(elsewhere))
    begin(tmp_path / "run", given)
    save(elsewhere)
    (elsewhere / "notes.txt").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    folder.prepare(tmp_path / "run", given.to_dict(), False, True)
    assert saved_steps(elsewhere) == [1]
    begin(tmp_path / "run", given, overwrite=True)
    assert saved_steps(elsewhere) == [] and (elsewhere / "notes.txt").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["starts"]) == 1


def test_overwrite_spares_the_weights_to_begin_from(tmp_path):
    begin(tmp_path / "run", config())
    save(tmp_path / "run" / "checkpoints")
    given = config(weights=folder.pinned(tmp_path / "run", str(tmp_path / "run"), False))
    with pytest.raises(ValueError, match=r"--overwrite would delete the weights .*run/checkpoints"):
        folder.prepare(tmp_path / "run", given.to_dict(), False, True)


def test_the_states_of_another_run_are_not_mixed_with_ours(tmp_path):
    save(tmp_path / "states")
    given = config(save__folder=str(tmp_path / "states")).to_dict()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"save\.folder=.* holds the checkpoints of another"):
            folder.prepare(tmp_path / "run", given, False, overwrite)
    assert saved_steps(tmp_path / "states") == [1]


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder.prepare(tmp_path / "file" / "run", config().to_dict(), False, False)
    with pytest.raises(OSError, match="file/run"):
        begin(tmp_path / "file" / "run", config())


def test_a_run_begun_from_a_run_names_its_checkpoint(tmp_path):
    """What the first run saves later changes nothing of the second."""
    base, later = tmp_path / "base", tmp_path / "later"
    begin(base, config())
    with pytest.raises(CheckpointError, match="base/checkpoints holds no finished checkpoint"):
        folder.pinned(later, str(base), False)
    save(base / "checkpoints", 3)
    pinned = folder.pinned(later, str(base), False)
    assert pinned == str(base / "checkpoints" / "3")
    begin(later, config(weights=pinned))
    save(base / "checkpoints", 8)
    assert folder.pinned(later, str(base), True) == pinned
    assert folder.pinned(later, str(base), False) == str(base / "checkpoints" / "8")
    assert folder.pinned(later, pinned, True) == pinned
    assert folder.pinned(later, "outputs/toy", True) == "outputs/toy"
    assert runs.place(base / "checkpoints" / "8") == runs.Place(base, 8)


def test_states_elsewhere_are_found_by_what_the_run_recorded(tmp_path):
    begin(tmp_path / "run", config(), checkpoints=str(tmp_path / "states"))
    save(tmp_path / "states", 4)
    assert runs.Place(tmp_path / "run", None).newest() == 4


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(log=0), r"--config\.log is 0; it must be 1 or more"),
        (dict(save__every=-1), r"--config\.save\.every is -1; it must be 0 or more"),
        (dict(save__last=0), "last must be 1 or more"),
        (dict(validation__steps=0), r"--config\.validation\.steps is 0"),
        (dict(preview__steps=0), r"--config\.preview\.steps is 0"),
        (dict(save__best=1), "validation_loss, which is not measured: give --config.data.valid"),
        (dict(save__best=1, save__metric="f1"), "save.metric is 'f1'; choose loss or validation"),
        (
            dict(save__best=1, data__validation="x", save__every=500, validation__every=300),
            "save.every 500 must be a multiple of validation.every 300",
        ),
        (dict(trackers=("comet",)), "'comet' is unknown"),
        (dict(optim__name="adam"), "optim.name is 'adam'"),
        (dict(lora__rank=2, train="^x"), "train is '.x' and lora.rank 2: beside adapters nothing"),
        (dict(lora__alpha=2.0), "lora.alpha is 2.0 without adapters"),
    ],
)
def test_wrong_options_are_told_first(changes, message):
    compose.check(image_sft.get_config("klein_4b"))
    compose.check(vlm_sft.get_config("qwen3_vl_8b"))
    compose.check(config(save__best=1, save__metric="loss"))
    compose.check(config(save__best=1, data__validation="x"))
    with pytest.raises(ValueError, match=message):
        compose.check(config(**changes))


def test_one_device_is_no_mesh_of_eight(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    with pytest.raises(ValueError, match=r"mesh data=1 x fsdp=8 .* needs 8 devices, 1 are present"):
        compose.compose(config(mesh__fsdp=8))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    """Both would write checkpoints under the same names."""
    code = f"""
import time
from pathlib import Path
from launch.training import folder
with folder.held(Path({str(tmp_path / "run")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        words = f"process {other.pid} is training there; wait"
        with pytest.raises(ValueError, match=words), folder.held(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.wait()
    with folder.held(tmp_path / "run"):
        pass
    folder.prepare(tmp_path / "run", {"save": {"folder": ""}, "weights": "w"}, False, False)
