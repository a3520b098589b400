"""The loop: resumed equals uninterrupted, failures lose nothing, numbers are true."""

import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.checkpoint import CheckpointError, Checkpoints, Keep
from clvr_jax.train import loop, optim, progress
from clvr_jax.train.metrics import FILE, Writers, check
from clvr_jax.train.progress import Line, Window, clock, describe
from clvr_jax.train.state import create
from clvr_jax.train.step import Settings, compiled, make_step

from . import toy

FROZEN = {"model": {}, "others": {"noise": jnp.float32(0.1)}}
SETTINGS = Settings("float32", ema=0.9)
OPTIM = optim.Optim(learning_rate=0.05, schedule="cosine", warmup=2.0)


class Run:
    """One attempt at a run of ten steps in a folder."""

    def __init__(self, folder, steps=10, save=5, keep=None, log=2):
        self.folder, self.text = folder, io.StringIO()
        self.when = loop.When(steps, log, save)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep or Keep())
        self.tx = optim.make(OPTIM, {"model": toy.params()}, 10)
        self.hooks = ()
        self.averages = {}

    def state(self):
        fresh = create({"model": toy.params()}, self.tx, ema=True)
        if not self.checkpoints.steps():
            return fresh
        step, meta = self.checkpoints.meta()
        assert meta["step"] == step
        self.averages = meta["averages"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            loop.saved(fresh),
        )
        return loop.loaded(self.checkpoints.restore(step, abstract))

    def train(self, batches=None):
        state = self.state()
        start = int(state.step)
        step = compiled(make_step(toy.loss, self.tx, SETTINGS, optim.schedule(OPTIM, 10)))
        made = (
            loop.Batch("toy", (batches or toy.batch)(i), {"rows": 8.0}, flops=100.0)
            for i in range(start, 10)
        )
        writers = Writers(self.folder, start)
        try:
            return loop.train(
                state,
                step,
                FROZEN,
                made,
                jax.random.key(3),
                self.when,
                checkpoints=self.checkpoints,
                meta={"config": "toy"},
                writers=writers,
                line=Line(10, out=self.text),
                hooks=self.hooks,
                peak=1e6,
                averages=self.averages,
            )
        finally:
            writers.close()
            self.checkpoints.close()


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Run(folder).train(), lines(folder)


def test_resumed_equals_uninterrupted(tmp_path, uninterrupted):
    first = Run(tmp_path, steps=5)
    first.train()
    state = Run(tmp_path).train()
    equal(state, uninterrupted[0])
    told = [(line["step"], line["loss"]) for line in lines(tmp_path) if line["step"] > 6]
    assert told == [(line["step"], line["loss"]) for line in uninterrupted[1] if line["step"] > 6]


def test_lines_beyond_the_checkpoint_are_dropped_on_resume(tmp_path):
    Run(tmp_path).train()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 12, "loss": 1}\n{"step": 1')  # killed while writing
    Writers(tmp_path, start=4).close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_sigterm_saves_and_stops(tmp_path, uninterrupted):
    def batches(i):
        if i == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.batch(i)

    with pytest.raises(loop.Interrupted, match="step 7"):
        Run(tmp_path, save=0).train(batches)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    again = Run(tmp_path)
    assert again.checkpoints.steps() == [7]
    equal(again.train(), uninterrupted[0])
    # with log=2 the line of step 8 averages a step before the end and one behind it
    told = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert told == [(line["step"], line["loss"]) for line in uninterrupted[1]]


def test_not_finite_stops_names_the_step_and_saves_the_good_state(tmp_path, uninterrupted):
    def batches(i):
        batch = toy.batch(i)
        if i == 6:
            batch["y"][0, 0] = np.inf
        return batch

    with pytest.raises(loop.NotFinite, match=r"step 7: .*model/first/kernel") as raised:
        Run(tmp_path, save=0).train(batches)
    assert "the update was not applied" in str(raised.value).lower()
    run = Run(tmp_path)
    (saved,) = run.checkpoints.steps()
    state = run.state()
    assert int(state.step) == saved
    run.checkpoints.close()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_a_failed_save_does_not_end_training_but_the_last_one_does(tmp_path, monkeypatch):
    run = Run(tmp_path)
    real, full = Checkpoints._check_room, [True]

    def check(self, state):
        if full[0]:
            raise CheckpointError("no room")
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "_check_room", check)

    def batches(i):
        full[0] = i < 7
        return toy.batch(i)

    run.train(batches)
    assert "NOT SAVED at step 5: no room; training goes on" in run.text.getvalue()
    assert Run(tmp_path).checkpoints.steps() == [10]
    full[0] = True
    with pytest.raises(CheckpointError, match="no room"):
        Run(tmp_path / "other").train(lambda i: toy.batch(i))


def test_numbers_are_averages_of_their_steps(tmp_path, uninterrupted):
    folder = tmp_path
    each = Run(folder, log=1)
    each.train()
    losses = [line["loss"] for line in lines(folder)]
    pairs = [line["loss"] for line in uninterrupted[1]]
    np.testing.assert_allclose(pairs, np.reshape(losses, (5, 2)).mean(1), rtol=1e-6)
    assert "rows_per_second" not in losses and "seconds_per_step" not in lines(folder)[0]
    last = uninterrupted[1][-1]
    assert last["rows_per_second"] == pytest.approx(8 / last["seconds_per_step"], rel=1e-6)
    assert last["mfu"] == pytest.approx(100 / last["seconds_per_step"] / 1e6, rel=1e-6)


def test_hooks_run_before_the_first_step_and_every_so_many(tmp_path):
    calls = []

    def call(state, step):
        calls.append((step, int(state.step)))
        return {"validation_loss": 1.0 / (step + 1)}

    run = Run(tmp_path, keep=Keep(last=1, best=1, metric="validation_loss"))
    run.hooks = (loop.Hook(4, call, first=True), loop.Hook(0, call, first=True))
    run.train()
    assert calls == [(0, 0), (4, 4), (8, 8), (10, 10)]
    assert {line["step"] for line in lines(tmp_path) if "validation_loss" in line} == {0, 4, 8, 10}
    assert "step 4: validation_loss 0.2" in run.text.getvalue()


def test_a_failed_save_does_not_cost_the_next_one(tmp_path, monkeypatch):
    """What the background met is told at the next save, which is made all the same."""
    run = Run(tmp_path)
    real, failures = run.checkpoints.wait, ["the disk was full"]

    def wait():
        real()
        if failures and run.checkpoints.steps():
            raise CheckpointError(failures.pop())

    monkeypatch.setattr(run.checkpoints, "wait", wait)
    run.train()
    assert "NOT SAVED: the disk was full; training goes on" in run.text.getvalue()
    assert Run(tmp_path).checkpoints.steps() == [5, 10]


def test_data_that_cannot_be_read_ends_the_run_with_its_state_saved(tmp_path, uninterrupted):
    def batches(i):
        if i == 7:
            raise RuntimeError("a.png is gone")
        return toy.batch(i)

    run = Run(tmp_path)
    with pytest.raises(RuntimeError, match=r"a\.png is gone"):
        run.train(batches)
    assert "the state is saved at step 7" in run.text.getvalue()
    again = Run(tmp_path)
    assert again.checkpoints.steps() == [5, 7]
    equal(again.train(), uninterrupted[0])
    told = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert told == [(line["step"], line["loss"]) for line in uninterrupted[1]]


def test_a_hook_that_fails_ends_the_run_with_its_state_saved(tmp_path):
    def call(state, step):
        raise OSError("held_out.png is gone")

    run = Run(tmp_path)
    run.hooks = (loop.Hook(3, call),)
    with pytest.raises(OSError, match="held_out"):
        run.train()
    assert Run(tmp_path).checkpoints.steps() == [3]
    before = Run(tmp_path / "before")
    before.hooks = (loop.Hook(3, call, first=True),)
    with pytest.raises(OSError, match="held_out"):
        before.train()
    assert Run(tmp_path / "before").checkpoints.steps() == []


def test_a_measured_number_belongs_to_its_own_step(tmp_path):
    """Step 10 was not validated: it is not the best by what step 4 measured."""
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0}
    run = Run(tmp_path, save=1, keep=Keep(last=1, best=1, metric="validation_loss"))
    call = lambda state, step: {"validation_loss": values[step]} if step in values else {}
    run.hooks = (loop.Hook(2, call),)
    run.train()
    assert Run(tmp_path).checkpoints.steps() == [4, 10]


def test_an_interrupted_run_leaves_whole_checkpoints(tmp_path, uninterrupted):
    def batches(i):
        if i == 6:
            raise KeyboardInterrupt
        return toy.batch(i)

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).train(batches)
    again = Run(tmp_path)
    assert again.checkpoints.steps() == [5]
    equal(again.train(), uninterrupted[0])


def test_numbers_that_cannot_be_written_do_not_end_the_run(tmp_path, monkeypatch):
    def full(self, step, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writers, "scalars", full)
    run = Run(tmp_path)
    run.train()
    assert "its numbers are NOT WRITTEN: [Errno 28] No space left" in run.text.getvalue()


def test_what_begins_anew_forgets_every_line(tmp_path):
    (tmp_path / FILE).write_text('{"step": 0, "validation_loss": 1}\n{"step": 2, "loss": 1}\n')
    Writers(tmp_path, start=0).close()
    assert lines(tmp_path) == []


def test_intervals_that_are_none_are_refused():
    for options in ({"log": 0}, {"save": -1}):
        with pytest.raises(ValueError, match="log must be 1 or more, save 0 or more"):
            loop.When(10, **options)


def test_the_first_steps_of_programs_are_no_measurement():
    window = Window(compile=2.0)
    values = window.close(1e12)
    assert values["seconds_compile"] == 2.0 and "seconds_per_step" not in values
    assert "| compiled (data 0" in describe(1, 10, values)


def test_wandb_goes_on_in_the_same_run_with_our_steps(tmp_path, monkeypatch):
    """Its own steps only grow: a resumed run would lose what it computes a second time."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values: calls.append(values),
        define_metric=lambda *args, **options: calls.append((args, options)),
        finish=lambda: calls.append("finished"),
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: calls.append((options["id"], options["resume"])) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 5):
        writers = Writers(tmp_path, start, ("wandb",))
        writers.scalars(start + 1, {"loss": 1.0})
        writers.close()
    first, second = calls[:4], calls[4:]
    assert first[0] == second[0] and first[0][1] == "allow"
    assert first[1] == (("*",), {"step_metric": "step"})
    assert first[2] == {"step": 1, "loss": 1.0} and second[2] == {"step": 6, "loss": 1.0}


def test_the_progress_line(monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 110.0)
    window = Window(began=100.0)
    window.data, window.save = 1.0, 2.0
    window.count({"images": 16.0}, 4e12)
    window.count({"images": 16.0}, 4e12)
    values = {"loss": 0.5, "grad_norm": 1.25, "learning_rate": 1e-5, **window.close(2e12)}
    values["seconds_left"] = 450.0
    assert values["seconds_per_step"] == pytest.approx(4)
    assert values["mfu"] == pytest.approx(0.5)
    text = describe(10, 100, values)
    assert text.startswith("step 10/100 | loss 0.5 | grad 1.25 | lr 1.00e-05 | 4 s/step (data 0.5")
    assert "4 images/s" in text and "MFU 50.0%" in text and "ETA 0:07:30" in text
    assert clock(3661.0) == "1:01:01"


def test_a_terminal_has_one_line_that_changes():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    line = Line(10, out=out)
    values = {"seconds_per_step": 1.0, "seconds_data": 0, "seconds_save": 0, "seconds_other": 0}
    values["seconds_left"] = 9.0
    line.show(1, values)
    line.show(2, values)
    line.say("saved")
    assert out.getvalue().count("\n") == 2 and out.getvalue().count("\r") == 2
    assert Line(10, active=False, out=out).show(3, values) is None
    assert "step 3" not in out.getvalue()


def test_trackers_are_checked_before_anything_starts():
    with pytest.raises(ValueError, match="'comet' is unknown; choose from tensorboard, wandb"):
        check(("comet",))
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ValueError, match=r'wandb needs: pip install -e "\.\[wandb\]"'):
            check(("wandb",))
    check(())
