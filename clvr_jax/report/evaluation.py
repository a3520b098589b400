"""The page of an evaluation: headline numbers, tables of rates, pictures that passed or failed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from clvr_jax.report.chart import Chart
from clvr_jax.report.page import page
from clvr_jax.statistics import Rate


class Tile(NamedTuple):
    """A headline number: what it is, the number as text, and a line to it."""

    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """A table.

    Attributes:
      title: above it.
      head: of the columns.
      rows: cells; the first names the row. A `Rate` is drawn as a bar with its interval.
      note: below it.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str | Rate, ...]]
    note: str = ""


class Card(NamedTuple):
    """One case.

    Attributes:
      text: what was asked.
      passed: whether it was met.
      pictures: (label, data URI) of what was given and what was drawn.
      notes: what is wrong.
      source: where it comes from, small.
    """

    text: str
    passed: bool
    pictures: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    source: str = ""


class Gallery(NamedTuple):
    """Cards of one kind.

    Attributes:
      title: the kind.
      rate: of all its cases, not of the cards.
      cards: some of them.
    """

    title: str
    rate: Rate
    cards: Sequence[Card]


class Section(NamedTuple):
    """A part of the page: charts first, tables, then galleries; each may be empty."""

    title: str
    text: str
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    charts: Sequence[Chart] = ()


def evaluation_page(
    title: str,
    subtitle: str,
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    facts: Sequence[tuple[str, Any]],
) -> str:
    """Return the HTML.

    Args:
      title: of the page.
      subtitle: what was evaluated, in a line.
      tiles: at the top.
      sections: in order.
      facts: what ran and on what, at the end.
    """
    return page(
        "evaluation.html.jinja",
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=sections,
        facts=facts,
    )
