"""Many tasks at once: each in a thread of its own, their model calls batched by the backends."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from clvr_jax.closed_loop import Result, Task
from clvr_jax.closed_loop.events import OnEvent
from launch.drawing import folder
from launch.pictures import write_text

SETTINGS = "settings.json"
# parts of the configs that say how work is spread, not what is drawn; what the system message is
# stands beside them
_SPREAD = re.compile(
    r"(vlm_)?config\.(batch|layers|attention|cache_gib|max_rows|devices|loop\.concurrency|mesh\..*"
    r"|loop\.system|remote\.(timeout|max_in_flight|cache|transcript))"
)
Work = Callable[[Task, OnEvent], Result]


def check(out: Path, tasks: Sequence[Task], settings: Mapping[str, Any], resume: bool) -> None:
    """Decide whether tasks may be drawn, or gone on with, in a folder. Nothing is written.

    Raises:
      FileExistsError: it holds something and `resume` is not given.
      ValueError: what it holds was drawn with other settings, or of other prompts.
    """
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if held and not resume:
        raise FileExistsError(
            f"{out} exists and holds {', '.join(held[:3])}{' ...' * (len(held) > 3)}; --resume "
            "goes on with it, or choose another --out"
        )
    file = out / SETTINGS
    if held and not file.exists():
        raise FileExistsError(f"{out} is not empty and holds no drawings; choose another --out")
    if file.exists():
        known = _flat(json.loads(file.read_text()))
        given = _flat(json.loads(json.dumps(dict(settings))))
        other = sorted(
            key
            for key in {*known, *given}
            if known.get(key) != given.get(key) and not _SPREAD.fullmatch(key)
        )
        if other:
            lines = [f"{key}: {known.get(key)!r} there, {given.get(key)!r} given" for key in other]
            raise ValueError(f"{out} was drawn with other settings:\n" + "\n".join(lines))
    for task in tasks:
        folder.finished(out, task)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested settings by their path, as flags name them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{rest}".rstrip("."): leaf for rest, leaf in inner.items()}
    return found


def draw(
    work: Work,
    tasks: Sequence[Task],
    out: Path,
    settings: Mapping[str, Any],
    title: str,
    concurrency: int,
    on_event: OnEvent,
) -> tuple[list[Result], Path]:
    """Draw all tasks that are not done yet, and write what comes of them as it comes.

    A task that failed has a folder that says why; it is drawn again when the run is gone on with.
    After an error or an interrupt, what is under way is still drawn and written.

    Args:
      work: draws one; called in several threads.
      tasks: all of them.
      out: folder of all.
      settings: what must be the same to go on with the run; also told on every page.
      title: of the index.
      concurrency: tasks at once.
      on_event: told what happens, in several threads.

    Returns:
      What came of those that were drawn now, in the order of the tasks; and the page to look at.
    """
    write_text(out / SETTINGS, json.dumps(dict(settings), indent=2) + "\n")
    left = [task for task in tasks if not folder.finished(out, task)]
    results: dict[str, Result] = {}
    page = out / folder.PAGE

    def finish(task: Task) -> tuple[Result, Path]:
        # written where it was drawn, so that an error or an interrupt elsewhere does not lose it
        result = work(task, on_event)
        return result, folder.write(out, result, settings)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="task") as threads:
        waiting = [threads.submit(finish, task) for task in left]
        try:
            for future in as_completed(waiting):
                result, page = future.result()
                results[result.task.id] = result
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    index = folder.write_index(out, title, tasks, settings)
    if len(tasks) > 1:
        page = index
    elif not left:
        page = out / tasks[0].id / folder.PAGE
    return [results[task.id] for task in left], page
