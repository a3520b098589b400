"""What `python -m launch.data` prints: records, conversations, conditions, counts, progress."""

import contextlib
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clvr_jax.data.conditioning import Policy, condition
from clvr_jax.data.images import image_size
from clvr_jax.data.sources import Source
from clvr_jax.data.trajectory import Trajectory


def parse_policy(text: str) -> Policy:
    """Return the policy of `name=value,name=value`, or of JSON.

    Raises:
      ValueError: it is neither, or the policy refuses it.
    """
    if text.lstrip().startswith("{"):
        return Policy.from_json(text)
    fields = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--policy: {pair!r} is not NAME=VALUE, e.g. references=chosen")
        fields[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return Policy.from_json(fields)


def find(source: Source, index: int, name: str | None) -> int:
    """Return the number of the record with an id, or check a number.

    Raises:
      ValueError: there is none.
    """
    if name is None:
        if not 0 <= index < len(source):
            raise ValueError(f"record {index} is asked for, there are {len(source)} from 0")
        return index
    for number, made in enumerate(source):
        if made.id == name:
            return number
    raise ValueError(f"none of the {len(source)} records has the id {name!r}")


def show_record(made: Trajectory, where: str) -> None:
    """Print a trajectory for reading."""
    print(f"{made.id}  ({where})")
    _field("goal", made.goal)
    _field("system", made.system)
    for number, step in enumerate(made.steps, 1):
        print(f"\nstep {number}")
        _field("reasoning", step.reasoning)
        if step.action is not None:
            names = ", ".join(map(str, step.action.references))
            _field("action", step.action.kind + (f" of image {names}" if names else ""))
            _field("prompt", step.action.prompt)
        _field("image", f"{step.image}, {_size(step.image)}")
        _field("critique", step.critique)
        _field("verdict", step.verdict)
        _field("metadata", json.dumps(step.metadata) if step.metadata else None)
    print()
    _field("closing", made.closing)
    _field("outcome", made.outcome)
    _field("final", f"image {made.final}" if made.final else None)
    _field("metadata", json.dumps(made.metadata) if made.metadata else None)


def show_conversation(made: Trajectory) -> None:
    """Print the conversation that the vision-language model is trained on."""
    for message in made.messages():
        print(f"--- {message.role}")
        for part in message.parts:
            print(part if isinstance(part, str) else f"[image {part.number}: {part.image}]")


def show_condition(made: Trajectory, number: int, policy: Policy) -> None:
    """Print what the image model is given for image `number`, counted from 1.

    Raises:
      ValueError: there is no such image, or the policy cannot be followed.
    """
    if not 1 <= number <= len(made.steps):
        raise ValueError(f"--step={number}: the record has the steps 1 to {len(made.steps)}")
    given = condition(made, number - 1, policy)
    print(f"policy  {policy.to_json()}\n\n--- text\n{given.text}\n\n--- references")
    for place, index in enumerate(given.references):
        step, offset = made.steps[index], 10 + 10 * place
        print(f"{place + 1}: image {index + 1}, T = {offset}, {step.image}")
    if not given.references:
        print("none")
    print(f"\n--- target\n{made.steps[number - 1].image}")


def show_stats(source: Source) -> None:
    """Print counts of a dataset as a table; reads every record and every image's header."""
    steps, kinds, references, outcomes = Counter(), Counter(), Counter(), Counter()
    words = {"goal": [], "reasoning": [], "prompt": [], "closing": []}
    images = []
    for made in source:
        steps[len(made.steps)] += 1
        outcomes["with a closing" if made.closing else "without a closing"] += 1
        words["goal"].append(made.goal)
        words["closing"] += filter(None, [made.closing])
        for step in made.steps:
            images.append(step.image)
            words["reasoning"].append(step.reasoning)
            kinds[step.action.kind if step.action else "no action"] += 1
            if step.action:
                words["prompt"].append(step.action.prompt)
                references[len(step.action.references)] += 1
    with ThreadPoolExecutor(8) as pool:
        sizes = Counter(pool.map(image_size, images))
    table = Table("what", "which", "count", "share", title=f"{len(source)} trajectories")
    _rows(table, "steps", sorted(steps.items()))
    _rows(table, "ends", outcomes.most_common())
    _rows(table, "action", kinds.most_common())
    _rows(table, "references", sorted(references.items()))
    _rows(table, "image size", [(f"{w}x{h}", n) for (w, h), n in sizes.most_common(8)])
    rest = sizes.total() - sum(n for _, n in sizes.most_common(8))
    if rest:
        table.add_row("", f"{len(sizes) - 8} other sizes", str(rest), f"{rest / len(images):.1%}")
    lengths = Table("words of", "texts", "least", "median", "95 %", "most")
    for name, texts in words.items():
        counts = sorted(len(text.split()) for text in texts)
        if counts:
            marks = (counts[0], _quantile(counts, 0.5), _quantile(counts, 0.95), counts[-1])
            lengths.add_row(name, str(len(counts)), *map(str, marks))
    console = Console()
    console.print(table)
    console.print(lengths)
    console.print(f"fingerprint {source.fingerprint}")


@contextlib.contextmanager
def progress_line(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, total) that draws a bar; nothing where there is no terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def counted(source: Source, what: str) -> Iterator[Iterator[Trajectory]]:
    """Give the trajectories of a source, with a bar that counts them."""
    with progress_line(what) as progress:

        def trajectories() -> Iterator[Trajectory]:
            for number, made in enumerate(source):
                progress(number, len(source))
                yield made

        yield trajectories()


def _size(image: str) -> str:
    try:
        width, height = image_size(image)
    except ValueError:
        return "which cannot be read (validate says why)"
    return f"{width}x{height}"


def _field(name: str, text: str | None) -> None:
    if text:
        lines = [
            wrapped
            for line in text.splitlines()
            for wrapped in textwrap.wrap(line, 88, break_long_words=False) or [""]
        ]
        print(f"  {name:<10}" + f"\n{' ' * 12}".join(lines))


def _rows(table: Table, what: str, counts: Sequence[tuple[object, int]]) -> None:
    total = sum(count for _, count in counts)
    for row, (which, count) in enumerate(counts):
        table.add_row("" if row else what, str(which), str(count), f"{count / total:.1%}")
    table.add_section()


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
