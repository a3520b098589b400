"""A comparison of drawings as tables on the terminal, as a page and as a result file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Printed

from clvr_jax.report.chart import Chart, Curve
from clvr_jax.report.evaluation import Section, Table, Tile, evaluation_page
from clvr_jax.report.page import percent
from clvr_jax.statistics import Difference, Rate
from launch.evaluation.view import plain
from launch.pictures import write_text

_COSTS = ("pictures", "evaluations", "tokens", "seconds")
_STOPS = {
    "by_own_decision": "stops by itself",
    "stopped_unsatisfied": "stopped, and wrong",
    "edited_though_right": "right, and gone on",
}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return what a comparison says, as tables of rates and words."""
    arms, against = report["arms"], report["against"]
    groups = list(next(iter(arms.values()))["groups"])
    found = [
        Table(
            "Passed",
            ("way", "passed", *_COSTS),
            [(n, arm["passed"], *(f"{arm[c]:.4g}" for c in _COSTS)) for n, arm in arms.items()],
            "Costs are means of a prompt; seconds as it waited, others drawn beside it.",
        ),
        Table(
            "By task and complexity",
            ("", *arms),
            [(group, *(arm["groups"][group] for arm in arms.values())) for group in groups],
        ),
        Table(
            "When it stops",
            ("way", *_STOPS.values(), "ever right"),
            [(n, *(arm[key] for key in _STOPS), arm["ever_right"]) for n, arm in arms.items()],
            "Ever right: one of its pictures passes, whichever it gives as its answer.",
        ),
        Table(
            "Pictures of a prompt",
            ("way", "prompts of each number", "ends"),
            [(n, _counts(arm["lengths"]), _counts(arm["outcomes"])) for n, arm in arms.items()],
        ),
    ]
    for name, arm in arms.items():
        if arm["budgets"]:
            rows = [
                (n, b["passed"], *(f"{b[cost]:.4g}" for cost in _COSTS))
                for n, b in arm["budgets"].items()
            ]
            note = (
                "One run tells of all: under a smaller budget a loop does the same until its end. "
                "Costs are means of a prompt; seconds those of thinking and drawing."
            )
            head = ("pictures at most", "passed", *_COSTS)
            found.append(Table(f"{name} under smaller budgets", head, rows, note))
    if report["differences"]:
        apart = report["differences"].items()
        rows = [(n, _points(d["all"]), f"{d['p_holm']:.2g}") for n, d in apart]
        note = "Points; interval of Newcombe's method 10; McNemar's exact test, adjusted by Holm."
        found.insert(1, Table(f"{against} less another way", ("way", "apart", "p"), rows, note))
        rows = [(g, *(_points(d["groups"][g]) for _, d in apart)) for g in groups]
        found.insert(
            3, Table(f"{against} less another, by group", ("", *(n for n, _ in apart)), rows)
        )
    return found


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """Return what a prompt costs beside what it brings, for evaluations and for tokens.

    The way that all are compared with comes first; loops are curves over their budgets.
    """
    arms = dict(sorted(report["arms"].items(), key=lambda item: item[0] != report["against"]))
    note = "95 % intervals. A curve: at most one picture of a prompt, two, and so on."
    return [
        Chart(
            f"Passed over {cost} of a prompt",
            f"{cost}, mean of a prompt",
            [
                Curve(
                    name,
                    [(b[cost], b["passed"]) for b in arm["budgets"].values()]
                    or [(arm[cost], arm["passed"])],
                )
                for name, arm in arms.items()
            ],
            note,
        )
        for cost in ("evaluations", "tokens")
        if any(arm[cost] for arm in arms.values())
    ]


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in counted.items())


def _points(apart: Difference) -> str:
    value, low, high = (100 * part for part in apart)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(width=120)
    for table in tables(report):
        printed = Printed(title=table.title, title_justify="left", caption=table.note or None)
        for name in table.head:
            printed.add_column(name)
        for row in table.rows:
            printed.add_row(*map(_cell, row))
        console.print(printed)


def _cell(cell: str | Rate) -> str:
    if not isinstance(cell, Rate):
        return cell
    if not cell.trials:
        return "none"
    return f"{percent(cell.value)} ({100 * cell.low:.1f} - {100 * cell.high:.1f}, {cell.trials})"


def write(out: Path, about: Mapping[str, Any], report: Mapping[str, Any]) -> Path:
    """Write results.json and index.html; return the page."""
    write_text(out / "results.json", json.dumps({**about, **plain(dict(report))}, indent=1) + "\n")
    rates = [(name, arm["passed"]) for name, arm in report["arms"].items()]
    tiles = [
        Tile(name, percent(r.value), f"{100 * r.low:.1f} – {100 * r.high:.1f}") for name, r in rates
    ]
    html = evaluation_page(
        f"Ways to draw, {report['prompts']} prompts",
        "The same prompts and seeds in every way; rates are of what the evaluation detector reads "
        "in the pictures.",
        tiles,
        [Section("Ways", "", tables(report), charts=charts(report))],
        [
            (key, value if isinstance(value, str) else json.dumps(value))
            for key, value in about.items()
        ],
    )
    write_text(out / "index.html", html)
    return out / "index.html"
