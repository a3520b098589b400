"""What a drawn prompt leaves: a folder with trajectory, pictures and page; over all an index.

OUT/index.html                  leads to every prompt
OUT/trajectories.jsonl          every trajectory, as training reads them
OUT/0000-a-red-cup-0/           one prompt and seed
    index.html                  the page, pictures inside
    trajectory.json             steps, actions, critiques; seconds, tokens, evaluations of each
    result.json                 what the whole took, why it failed if it did
    1.png ... n.png             pictures; prompt, seed and models in their text
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.closed_loop import Result, Task
from clvr_jax.data.trajectory import Trajectory
from clvr_jax.report.page import png_uri
from clvr_jax.report.trajectory import Entry, Spent, index_page, trajectory_page
from launch.folders import aside
from launch.pictures import write_png, write_text

SOME_FAILED = 3  # exit status of a command that drew all prompts but some
RESULT, TRAJECTORY, PAGE, ALL = "result.json", "trajectory.json", "index.html", "trajectories.jsonl"
_SMALL = 256  # pixels of a picture in the index


def slug(prompt: str) -> str:
    """Return a prompt as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "empty"


def tasks(prompts: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """Return one task for every prompt and seed; its id is the name of its folder."""
    return [
        Task(f"{number:04d}-{slug(prompt)}-{seed}", prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]


def finished(out: Path, task: Task) -> bool:
    """Return whether a task is done; one that failed is not.

    Raises:
      ValueError: its folder is of another prompt.
    """
    file = out / task.id / RESULT
    if not file.exists():
        return False
    known = json.loads(file.read_text())
    if known["goal"] != task.goal:
        raise ValueError(f"{file.parent} is of {known['goal']!r}, not of {task.goal!r}")
    return known["error"] is None


def write(out: Path, result: Result, about: Mapping[str, Any]) -> Path:
    """Write the folder of a task, aside and then renamed; return its page.

    Args:
      out: folder of all.
      result: what came of it.
      about: what is the same for all tasks: settings, weights, versions.
    """
    folder, trajectory = out / result.task.id, result.trajectory
    if folder.exists():  # of an earlier try that failed
        shutil.rmtree(folder)
    spent = Spent(len(result.pictures), result.evaluations, result.tokens, result.seconds)
    with aside(folder) as partial:
        partial.mkdir(parents=True)
        record = {
            "goal": result.task.goal,
            "seed": result.task.seed,
            "outcome": trajectory.outcome if trajectory else "failed",
            "final": (trajectory.final or len(trajectory.steps)) if trajectory else None,
            "error": result.error,
            **spent._replace(seconds=round(spent.seconds, 3))._asdict(),
            "about": dict(about),
        }
        if trajectory is not None:
            for step, picture in zip(trajectory.steps, result.pictures, strict=True):
                text = {"prompt": result.task.goal, "step": step.model_dump(mode="json"), **about}
                write_png(partial / step.image, np.asarray(picture), text)
            write_text(partial / TRAJECTORY, json.dumps(trajectory.record(), indent=2) + "\n")
            facts = {name: _words(value) for name, value in about.items()}
            facts["seed"] = str(result.task.seed)
            page = trajectory_page(trajectory, result.pictures, spent, facts)
            write_text(partial / PAGE, page)
        write_text(partial / RESULT, json.dumps(record, indent=2) + "\n")
    return folder / (PAGE if trajectory is not None else RESULT)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_index(out: Path, title: str, done: Iterable[Task], about: Mapping[str, Any]) -> Path:
    """Write the index of tasks that are done, and all their trajectories in one file.

    Args:
      out: folder of all.
      title: of the index.
      done: tasks that have folders.
      about: what is the same for all.
    """
    entries, lines = [], []
    for task in done:
        known = json.loads((out / task.id / RESULT).read_text())
        picture = None
        file = out / task.id / TRAJECTORY
        if file.exists():
            trajectory = Trajectory.model_validate_json(file.read_text())
            places = [f"{task.id}/{step.image}" for step in trajectory.steps]
            lines.append(json.dumps(trajectory.with_images(places).record()))
            picture = _thumbnail(out / places[(trajectory.final or len(places)) - 1])
        spent = Spent(*(known[name] for name in Spent._fields))
        page = PAGE if file.exists() else RESULT
        entries.append(Entry(task.goal, known["outcome"], spent, f"{task.id}/{page}", picture))
    write_text(out / ALL, "".join(line + "\n" for line in lines))
    facts = {name: _words(value) for name, value in about.items()}
    write_text(out / PAGE, index_page(title, entries, facts))
    return out / PAGE


def _thumbnail(file: Path) -> str:
    with Image.open(file) as picture:
        return png_uri(picture, _SMALL)
