"""An evaluation as a page: tables, and pictures that passed and failed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.report.evaluation import Card, Gallery, Section, Table, Tile, evaluation_page
from clvr_jax.report.page import percent, png_uri
from clvr_jax.statistics import Rate
from launch.evaluation.miniature import Ceiling, Drawn, Evaluation
from launch.evaluation.view import (
    DETECTION,
    DETECTORS,
    EDIT_FIELDS,
    READ,
    THINGS,
    ceiling_rows,
    detection_rows,
    edit_rows,
    inventory_rates,
    speed,
    tiers,
)
from launch.pictures import write_text

_CARDS = 6  # cards of one kind that passed, and as many that failed
_PICKED = "The first ones of each kind by number, passed and failed; none is chosen."


def write(file: Path, about: dict[str, Any], evaluation: Evaluation) -> None:
    """Write the page, one file."""
    settings = about["settings"]
    sections = [_prompts(evaluation.prompts)]
    if evaluation.edits:
        sections.append(_edits(evaluation.edits))
    if evaluation.ceiling:
        sections.append(_ceiling(evaluation.ceiling))
    if evaluation.reading:
        sections.append(_reading(evaluation.reading))
    html = evaluation_page(
        f"Miniature, {settings['split'].replace('_', '-')} split",
        f"{settings['weights']}: {settings['steps']} steps, guidance {settings['guidance']:g}, "
        f"seed {settings['seed']}. Rates are of what the evaluation detector reads in the "
        "pictures.",
        list(_tiles(evaluation)),
        sections,
        list(_facts(about)),
    )
    write_text(file, html)


def _tiles(evaluation: Evaluation) -> Iterator[Tile]:
    report = evaluation.prompts.report
    yield _rate_tile("prompts passed", report["overall"])
    if evaluation.edits:
        yield _rate_tile(
            "single edits passed", evaluation.edits.report["references"]["1"]["passed"]
        )
    if evaluation.ceiling:
        yield _rate_tile("VAE ceiling", evaluation.ceiling.report["recoded"]["evaluation"])
    yield Tile("detectors agree", percent(report["agreement"]["verdicts"]), "on pass or fail")
    found = report["speed"]
    note = f"compiling apart, {found['compile_s']:.0f} s"
    yield Tile("pictures per second", f"{found['pictures_per_s']:.3g}", note)


def _rate_tile(label: str, rate: Rate) -> Tile:
    ends = f"{100 * rate.low:.1f} – {100 * rate.high:.1f}, {rate.passed} of {rate.trials}"
    return Tile(label, percent(rate.value), ends)


def _prompts(drawn: Drawn) -> Section:
    report, agree = drawn.report, drawn.report["agreement"]
    total = report["overall"].trials
    faults = sorted(report["faults"].items(), key=lambda fault: -fault[1]["pictures"])
    tables = [
        Table("By task", ("task", "passed"), [*report["kinds"].items()]),
        Table(
            "By complexity",
            ("tier", "passed"),
            [*tiers(report), ("all", report["overall"])],
            "V ln V + E + 0.1 words: things, what is said of them and relations, length.",
        ),
        Table(
            "What is wrong",
            ("fault", "pictures", "times"),
            [
                (
                    kind,
                    f"{found['pictures']} ({percent(found['pictures'] / total)})",
                    str(found["times"]),
                )
                for kind, found in faults
                if found["times"]
            ],
            "A picture may have several.",
        ),
        Table(
            "Two detectors agree",
            ("on", "share"),
            [
                ("pass or fail", percent(agree["verdicts"])),
                ("whether a picture is clean", percent(agree["clean"])),
                ("all cells of a picture", percent(agree["pictures"])),
                ("all cells, both call it clean", percent(agree["clean_pictures"])),
                ("single cells", percent(agree["cells"])),
            ],
        ),
    ]
    galleries = _galleries(
        drawn,
        report["kinds"],
        shown=lambda i: [("", drawn.pictures[i])],
        notes=lambda i: [words for _, words in drawn.verdicts[i].faults],
    )
    return Section("Prompts", f"{speed(report['speed'])}. {_PICKED}", tables, galleries)


def _edits(drawn: Drawn) -> Section:
    report = drawn.report
    table = Table(
        "By kind of edit",
        ("edit", *EDIT_FIELDS),
        [(name, *rates) for name, rates in edit_rows(report)],
        "Passed: the picture is clean, the change is made, and all else is as it was. Changed: the "
        "change is made, whatever else happened. Kept: all else is as it was.",
    )

    def shown(i: int) -> list[tuple[str, np.ndarray]]:
        labels = ("before",) if len(drawn.given[i]) == 1 else ("image 1", "image 2")
        return [*zip(labels, drawn.given[i], strict=True), ("after", drawn.pictures[i])]

    galleries = _galleries(
        drawn,
        {kind: rates["passed"] for kind, rates in report["kinds"].items()},
        shown=shown,
        notes=lambda i: drawn.verdicts[i].faults,
    )
    text = f"On renders of true scenes. {speed(report['speed'])}. {_PICKED}"
    return Section("Edits", text, [table], galleries)


def _ceiling(ceiling: Ceiling) -> Section:
    report = ceiling.report
    rows = [(name, *rates) for name, rates in ceiling_rows(report)]
    note = f"The VAE changes a pixel by {report['mean_error_levels']:.2f} grey levels on average."
    table = Table("Read exactly", ("pictures", *DETECTORS.values()), rows, note)
    numbers = [*np.flatnonzero(ceiling.exact)[:_CARDS], *np.flatnonzero(~ceiling.exact)[:_CARDS]]
    cards = []
    for i in numbers:
        shown = ("render", png_uri(ceiling.before[i])), ("recoded", png_uri(ceiling.after[i]))
        cards.append(Card(f"scene {i}", bool(ceiling.exact[i]), shown))
    gallery = Gallery("renders and their reconstructions", report["recoded"]["evaluation"], cards)
    text = (
        f"Renders of {report['scenes']} scenes, and the same encoded and decoded: what no drawn "
        "picture can be expected to be better than."
    )
    return Section("VAE ceiling", text, [table], [gallery])


def _reading(reading: dict[str, Any]) -> Section:
    tables = []
    for name, found in reading.items():
        unread = found["unreadable"]
        words = (
            f"{found['pictures']} pictures; not to be understood: {unread['inventory']} "
            f"inventories, {unread['critique']} critiques."
        )
        columns = ("pictures", "inventory", *THINGS)
        tables.append(Table("Inventories", columns, [(READ[name], *inventory_rates(found))], words))
        rows = [(fault, *rates) for fault, rates in detection_rows(found)]
        tables.append(Table(f"Faults in {READ[name]}", ("fault", *DETECTION), rows))
    text = (
        "What the vision-language model says of pictures, against what a render shows, or against "
        "what the evaluation detector reads in a drawn picture; inventories of clear ones alone."
    )
    return Section("Reading", text, tables, [])


def _galleries(
    drawn: Drawn,
    rates: dict[str, Rate],
    shown: Callable[[int], Sequence[tuple[str, np.ndarray]]],
    notes: Callable[[int], Sequence[str]],
) -> list[Gallery]:
    """Cards of each kind.

    Args:
      drawn: all cases.
      rates: of the kinds.
      shown: labels and pictures of a case.
      notes: what is wrong with it.
    """
    galleries = []
    for kind, rate in rates.items():
        numbers = [i for i, asked in enumerate(drawn.asked) if asked.kind == kind]
        cards = []
        for i in _some(numbers, drawn.verdicts):
            item, verdict = drawn.report["items"][i], drawn.verdicts[i]
            source = f"no. {item['number']}, seed {item['seed']}"
            pictures = tuple((label, png_uri(picture)) for label, picture in shown(i))
            text = drawn.asked[i].text
            cards.append(Card(text, verdict.passed, pictures, _few(notes(i)), source))
        galleries.append(Gallery(kind, rate, cards))
    return galleries


def _some(numbers: list[int], verdicts: list[Any]) -> list[int]:
    """The first few that passed, then the first few that failed."""
    split = [[i for i in numbers if verdicts[i].passed is wanted] for wanted in (True, False)]
    return [i for part in split for i in part[:_CARDS]]


def _few(notes: Sequence[str], most: int = 4) -> tuple[str, ...]:
    """At most so many notes, the last of them of how many more there are."""
    return (
        tuple(notes)
        if len(notes) <= most
        else (*notes[: most - 1], f"{len(notes) - most + 1} more")
    )


def _facts(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    environment, weights = about["environment"], about["weights"]
    yield "command", environment["command"]
    yield "weights", f"{weights['path']} ({weights['kind']})"
    for name, fingerprint in weights["fingerprints"].items():
        yield name.replace("_", " "), fingerprint
    yield "text lengths", ", ".join(map(str, weights["text_lengths"]))
    yield "date", environment["date"]
    yield "commit", str(environment["commit"])
    device = f"{environment['devices']} x {environment['device']}"
    yield "device", f"{device}, {environment['processor']}, {environment['cores']} cores"
    yield "versions", ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
