"""An evaluation as tables on the terminal, and as a result file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clvr_jax.statistics import Difference, Rate
from launch.evaluation.miniature import Evaluation
from launch.pictures import write_text

EDIT_FIELDS = ("passed", "changed", "kept")  # columns of edits
CEILING = {"renders": "renders", "recoded": "after the VAE"}  # rows of the VAE's ceiling
READ = {"renders": "renders", "drawn": "drawn pictures"}  # what a language model reads
THINGS = ("things: precision", "recall")  # columns behind its inventories
DETECTION = ("precision", "recall", "accuracy")  # columns of what it finds wrong
DETECTORS = {"evaluation": "evaluation detector", "reward": "reward detector"}  # and its columns


def write(file: Path, about: dict[str, Any], evaluation: Evaluation) -> None:
    """Write everything as JSON."""
    parts = {
        "prompts": evaluation.prompts.report,
        "edits": evaluation.edits and evaluation.edits.report,
        "vae": evaluation.ceiling and evaluation.ceiling.report,
        "reading": evaluation.reading,
    }
    write_text(file, json.dumps({**about, **plain(parts)}, indent=1) + "\n")


def show(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print the tables."""
    console = console or Console(width=100)
    report = evaluation.prompts.report
    rows = [("all", report["overall"]), *report["kinds"].items(), *tiers(report)]
    console.print(_table("prompts", ("passed",), [(name, [rate]) for name, rate in rows]))
    faults = ", ".join(
        f"{kind} {found['times']} in {found['pictures']}"
        for kind, found in report["faults"].items()
    )
    console.print(f"faults (times, pictures): {faults}", highlight=False)
    agree = report["agreement"]
    console.print(
        f"the two detectors agree on {agree['verdicts']:.1%} of verdicts, {agree['pictures']:.1%} "
        f"of pictures, {agree['cells']:.2%} of cells",
        highlight=False,
    )
    if evaluation.edits:
        console.print(_table("edits", EDIT_FIELDS, edit_rows(evaluation.edits.report)))
    if evaluation.ceiling:
        rows = ceiling_rows(evaluation.ceiling.report)
        console.print(_table("VAE", tuple(DETECTORS.values()), rows))
    if evaluation.reading:
        for name, found in evaluation.reading.items():
            title = f"reading {READ[name]}"
            console.print(_table(title, ("inventory", *THINGS), [("", inventory_rates(found))]))
            console.print(_table("faults", DETECTION, detection_rows(found)))
    for name, drawn in (("prompts", evaluation.prompts), ("edits", evaluation.edits)):
        if drawn:
            console.print(f"{name}: {speed(drawn.report['speed'])}", highlight=False)


def tiers(report: dict[str, Any]) -> list[tuple[str, Rate]]:
    """Return the rates of tiers with their names in words."""
    return [(f"tier {name}", rate) for name, rate in report["tiers"].items()]


def edit_rows(report: dict[str, Any]) -> list[tuple[str, list[Rate]]]:
    """Return name and rates (`EDIT_FIELDS`) of each kind of edit and number of references."""
    named = dict(report["kinds"])
    for number, rates in report["references"].items():
        named[f"with {number} reference{'s' * (number != '1')}"] = rates
    return [(name, [rates[field] for field in EDIT_FIELDS]) for name, rates in named.items()]


def ceiling_rows(report: dict[str, Any]) -> list[tuple[str, list[Rate]]]:
    """Return name and rates (of `DETECTORS`) of renders before and after the VAE."""
    return [(words, [report[name][by] for by in DETECTORS]) for name, words in CEILING.items()]


def inventory_rates(found: dict[str, Any]) -> list[Rate]:
    """Return what is said of the things that a model lists: inventories, then `THINGS`."""
    return [found["inventory"], *(found["things"][name] for name in ("precision", "recall"))]


def detection_rows(found: dict[str, Any]) -> list[tuple[str, list[Rate]]]:
    """Return name and rates (`DETECTION`) of "something is wrong" and of each kind of fault."""
    named = {"anything wrong": found["wrong"], **found["faults"]}
    return [(name, [rates[field] for field in DETECTION]) for name, rates in named.items()]


def speed(found: dict[str, Any]) -> str:
    """Return a speed in words."""
    return (
        f"{found['pictures_per_s']:.3g} pictures/s ({found['pictures']} in "
        f"{found['drawing_s']:.0f} s), compiling {found['compile_s']:.0f} s apart"
    )


def _table(title: str, fields: tuple[str, ...], rows: Sequence[tuple[str, list[Rate]]]) -> Table:
    """Rows of rates, each with its interval, and of how many they are."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for field in fields:
        table.add_column(field, justify="right")
        table.add_column("95 %", style="dim")
    table.add_column("of", justify="right")
    for name, rates in rows:
        cells = [text for rate in rates for text in _cells(rate)]
        table.add_row(name, *cells, str(rates[0].trials))
    return table


def _cells(rate: Rate) -> tuple[str, str]:
    if not rate.trials:
        return "none", ""
    return f"{rate.value:.1%}", f"{100 * rate.low:.1f} - {100 * rate.high:.1f}"


def plain(value: Any) -> Any:
    """Return a report for JSON: rates and differences as objects."""
    if isinstance(value, Rate):
        return value.as_dict()
    if isinstance(value, Difference):
        return value._asdict()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value
