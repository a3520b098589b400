"""Prompts drawn into folders and pages: what is written, gone on with, refused and told."""

import io
import json
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from clvr_jax.backends.protocol import user
from clvr_jax.backends.requests import CONTROL
from clvr_jax.closed_loop import Budget, Loop, Task
from clvr_jax.closed_loop.events import Acted, Drew, Ended, Retried, Said
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.sources import open_source
from clvr_jax.data.turns import Action
from configs import generate as generate_config
from configs import vlm as vlm_config
from launch.drawing import command, folder, models, options, run
from launch.drawing.show import Show
from tests.backends.remote.chat_server import ChatServer
from tests.closed_loop.scripted import GENERATE, STOP, Images, Vlm, edit

SETTINGS = {"mode": "loop", "weights": "abc"}
OPENAI = {"sampling_extensions": False, "max_tokens_field": "max_completion_tokens"}


def loop(vlm):
    policy = Policy(text="instruction", references="chosen")
    return Loop(vlm, Images(), policy, Budget(), retries=0, pause=0.0).run


def draw(work, tasks, out, events=None, **fields):
    settings = SETTINGS | fields
    run.check(out, tasks, settings, resume=True)
    tell = (lambda event: None) if events is None else events.append
    return run.draw(work, tasks, out, settings, "Two <prompts>", 1, tell)


def test_every_prompt_has_a_folder_and_all_have_an_index(tmp_path):
    out, tasks = tmp_path / "out", folder.tasks(["a red circle!", "Two stars"], [3])
    assert [task.id for task in tasks] == ["0000-a-red-circle-3", "0001-two-stars-3"]
    script = Vlm(GENERATE, edit(1), STOP, GENERATE, STOP)
    results, page = draw(loop(script), tasks, out)
    assert [result.error for result in results] == [None, None]
    assert page == out / "index.html" and "Two &lt;prompts&gt;" in page.read_text()
    first = out / tasks[0].id
    assert sorted(file.name for file in first.iterdir()) == [
        *("1.png", "2.png", "index.html", "result.json", "trajectory.json")
    ]
    known = json.loads((first / "result.json").read_text())
    assert (known["outcome"], known["final"], known["pictures"]) == ("stopped", 2, 2)
    assert (known["evaluations"], known["tokens"], known["about"]) == (8, 30, SETTINGS)
    with Image.open(first / "2.png") as picture:
        assert int(np.asarray(picture)[0, 0, 0]) == 2
        assert picture.text["prompt"] == "a red circle!"
        assert json.loads(picture.text["step"])["action"]["prompt"] == "add a star"
    html = (first / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html), "the page is whole by itself"
    source = open_source(out / "trajectories.jsonl")
    read = [source[i] for i in range(len(source))]
    assert [len(t.steps) for t in read] == [2, 1], "training reads what the loop has written"
    assert all((out / step.image).exists() or step.image for t in read for step in t.steps)


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path):
    out, tasks = tmp_path / "out", folder.tasks(["one", "two"], [0])
    results, _ = draw(loop(Vlm(GENERATE, STOP, GENERATE, "no")), tasks, out)
    assert results[1].error and (out / tasks[1].id / "1.png").exists()
    before = (out / tasks[0].id / "result.json").stat().st_mtime_ns
    results, _ = draw(loop(Vlm(GENERATE, STOP)), tasks, out)
    assert [result.task.id for result in results] == [tasks[1].id]
    assert json.loads((out / tasks[1].id / "result.json").read_text())["error"] is None
    assert (out / tasks[0].id / "result.json").stat().st_mtime_ns == before
    results, page = draw(loop(Vlm()), tasks, out)
    assert results == [] and page.exists()


def test_a_prompt_that_failed_before_its_first_picture_is_in_the_index(tmp_path):
    out, tasks = tmp_path / "out", folder.tasks(["one", "two"], [0])
    results, page = draw(loop(Vlm("no", GENERATE, STOP)), tasks, out)
    assert results[0].trajectory is None
    assert f'href="{tasks[0].id}/result.json"' in page.read_text()
    assert len((out / "trajectories.jsonl").read_text().splitlines()) == 1


def test_a_broken_run_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
    out, tasks = tmp_path / "out", folder.tasks(["one"], [0])

    def broken(*given):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "trajectory_page", broken)
        with pytest.raises(OSError, match="disk full"):
            draw(loop(Vlm(GENERATE, STOP)), tasks, out)
    assert not (out / tasks[0].id).exists()
    draw(loop(Vlm(GENERATE, STOP)), tasks, out)
    assert (out / tasks[0].id / "index.html").exists()


def test_an_error_elsewhere_loses_nothing_that_was_under_way(tmp_path, monkeypatch):
    out, tasks = tmp_path / "out", folder.tasks(["one", "two"], [0])
    write, both = folder.write, threading.Barrier(2)

    def full(out, result, about):
        both.wait(5)
        if result.task.goal == "one":
            raise OSError("disk full")
        time.sleep(0.2)
        return write(out, result, about)

    monkeypatch.setattr(folder, "write", full)
    with pytest.raises(OSError, match="disk full"):
        each = lambda task, tell: loop(Vlm(GENERATE, STOP))(task, tell)
        run.draw(each, tasks, out, SETTINGS, "Two", 2, lambda event: None)
    assert folder.finished(out, tasks[1]) and not (out / tasks[0].id).exists()


def test_a_run_goes_on_with_other_devices_and_fewer_at_once(tmp_path):
    out, tasks = tmp_path / "out", folder.tasks(["one"], [0])
    config = {"steps": 4, "batch": 4, "loop": {"concurrency": 8, "look": 1}}
    draw(loop(Vlm(GENERATE, STOP)), tasks, out, config=config)
    fewer = {"steps": 4, "batch": 1, "loop": {"concurrency": 1, "look": 1}}
    run.check(out, tasks, SETTINGS | {"config": fewer}, resume=True)
    fewer["loop"]["look"] = 2
    with pytest.raises(ValueError, match=r"settings:\nconfig.loop.look: 1 there, 2 given$"):
        run.check(out, tasks, SETTINGS | {"config": fewer}, resume=True)


def test_folders_of_other_runs_are_refused(tmp_path):
    out, tasks = tmp_path / "out", folder.tasks(["one"], [0])
    draw(loop(Vlm(GENERATE, STOP)), tasks, out)
    with pytest.raises(FileExistsError, match="--resume goes on with it"):
        run.check(out, tasks, SETTINGS, resume=False)
    with pytest.raises(ValueError, match="weights: 'abc' there, 'def' given"):
        run.check(out, tasks, SETTINGS | {"weights": "def"}, resume=True)
    with pytest.raises(ValueError, match="is of 'one', not of 'One'"):
        run.check(out, folder.tasks(["One"], [0]), SETTINGS, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds no drawings"):
        run.check(tmp_path / "other", tasks, SETTINGS, resume=True)


def told(total, *events):
    stream = io.StringIO()
    show = Show(total, stream)
    for event in events:
        show(event)
    return stream.getvalue()


def test_one_task_is_told_as_it_thinks():
    result = loop(Vlm(GENERATE, STOP))(Task("x", "a star"))
    text = told(
        1,
        *(Said("x", piece) for piece in ("I see <IM", "G_GEN_1> and", " a star.\n", '{"act', "}")),
        Acted("x", 2, "...", Action(kind="edit", prompt="move <IMG_GEN_1>", references=(1,))),
        Drew("x", 2, Image.new("RGB", (8, 8)), 1.25, 4),
        Retried("x", 3, "busy"),
        Acted("x", 3, "Not streamed.", None),
        Ended("x", result),
    )
    lines = text.splitlines()
    assert lines[0] == "I see picture 1 and a star."
    assert lines[1] == "  edits (picture 1): move picture 1"
    assert lines[2] == "  picture 2: 1.2 s, 4 evaluations"
    assert "  again: busy" in lines and "Not streamed." in lines
    assert lines[-1].startswith("the model was satisfied; 1 pictures, 4 evaluations, 20 tokens")


def test_many_tasks_are_told_a_line_each():
    result = loop(Vlm("no"))(Task("x", "a star"))
    text = told(2, Said("x", "I see"), Retried("x", 1, "busy"), Ended("x", result))
    assert text.splitlines()[0] == "x: step 1 again: busy"
    assert text.splitlines()[1].startswith("1/2 x: it failed: Failed: step 1 failed 1 times")


def test_configs_become_budgets_and_options(tmp_path):
    config = generate_config.get_config()
    assert options.budget_of(config) == Budget(8)
    config.loop.update(seconds=2.5, evaluations=100, tokens=7, look=0)
    assert options.budget_of(config) == Budget(8, 2.5, 100, 7, 0)
    said = options.options_of(vlm_config.get_config("greedy"))
    assert (said.temperature, said.max_tokens, said.seed) == (0.0, 1024, None)
    config.loop.system = "stock"
    assert options.system_of(config, trained=True)[1].startswith("You direct an image model")
    config.loop.system = "auto"
    assert options.system_of(config, trained=False)[0] == "stock"
    assert options.system_of(config, trained=True) == ("control", CONTROL)
    own = tmp_path / "system.txt"
    own.write_text("Draw.\n")
    config.loop.system = str(own)
    assert options.system_of(config, trained=True) == (str(own), "Draw.")
    config.loop.system = "nothing-there"
    with pytest.raises(FileNotFoundError, match="choose auto, control, stock, none or a file"):
        options.system_of(config, trained=True)
    own.write_text("first <think>")
    config.loop.system = str(own)
    with pytest.raises(ValueError, match=r"system.txt contains <think>"):
        options.system_of(config, trained=True)
    config.loop.constrain = "perhaps"
    with pytest.raises(ValueError, match="constrain is 'perhaps'"):
        command.worker("loop", Vlm(), Images(), Policy(), Budget(), None, config, said)


def test_a_server_is_asked_as_the_config_says():
    server = ChatServer()
    try:
        for api, expected in (({}, {"max_tokens", "top_k"}), (OPENAI, {"max_completion_tokens"})):
            config = vlm_config.get_config("greedy")
            config.remote.update(api)
            vlm = models.remote(server.url, "toy", None, config)
            vlm.start().ask([user("x")], options.options_of(config))
            vlm.close()
            fields = {"max_tokens", "max_completion_tokens", "top_k"}
            assert server.bodies[-1].keys() & fields == expected
    finally:
        server.close()


@pytest.mark.parametrize(
    "mode, loop, words",
    [
        ("best_of", dict(best_of=0), "best_of is 0"),
        (
            "best_of",
            dict(evaluations=8),
            "draws 4 pictures, which take 16 evaluations; the budget is 8 pictures and 8",
        ),
        ("one_shot", dict(evaluations=3), "draws 1 pictures, which take 4 evaluations"),
        ("best_of", dict(generations=2), "the budget is 2 pictures and -1"),
        ("rewrite", dict(seconds=1.0), "only --mode=loop keeps seconds"),
        ("best_of", dict(tokens=9, look=2), "only --mode=loop keeps tokens, look"),
    ],
)
def test_budgets_that_a_mode_cannot_keep_are_refused(mode, loop, words):
    config = generate_config.get_config()
    options.check_mode(mode, config, 4)
    config.loop.update(loop)
    options.check_mode("loop", config, 4)
    with pytest.raises(ValueError, match=words):
        options.check_mode(mode, config, 4)


@pytest.mark.parametrize("sources", [("miniature", None), ("FOLDER", "teacher")])
def test_words_of_no_small_world_are_refused(sources):
    models.check_words(["a red circle", "three stars and a ring"], sources)
    with pytest.raises(ValueError, match=r"in the prompt: cat\. This world knows up to 8 things"):
        models.check_words(["a red circle", "a cat"], sources)
    models.check_words(["a cat"], ("FOLDER", "ANOTHER"))


def test_what_the_teacher_cannot_direct_is_told_before_models_are_loaded():
    for prompt, words in {
        "a star left of a star": '"a star left of a star" cannot be drawn: a star left of a star: '
        "no words tell both",
        "a star above a ring. the star is below the ring": "no picture can show all of this",
    }.items():
        models.check_words([prompt], ("miniature", "FOLDER"))
        with pytest.raises(ValueError, match=words):
            models.check_words([prompt], ("miniature", models.TEACHER))
