"""The page of one trajectory, step by step, and the page that leads to many of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from clvr_jax.data.trajectory import Step, Trajectory
from clvr_jax.data.turns import MARKER
from clvr_jax.report.page import page, png_uri

ENDS = {
    "stopped": "the model was satisfied",
    "generations": "the pictures of the budget were drawn",
    "seconds": "the time of the budget was over",
    "evaluations": "the evaluations of the budget were used up",
    "tokens": "the tokens of the budget were used up",
    "context": "the conversation filled the model's context",
    "failed": "it failed",
    None: "everything was done",
}
_SMALL = 64  # pixels of a picture beside the step that works from it
_DOES = {"generate": "draws", "edit": "edits", None: "draws"}


class Spent(NamedTuple):
    """What a trajectory took: pictures, passes through the image network, tokens, seconds."""

    pictures: int
    evaluations: int
    tokens: int
    seconds: float


class Entry(NamedTuple):
    """One trajectory on the page of many.

    Attributes:
      goal: its prompt.
      outcome: why it ended, of `ENDS`.
      spent: what it took.
      link: to its page.
      picture: the answer, as a URI; None if there is none.
    """

    goal: str
    outcome: str | None
    spent: Spent
    link: str
    picture: str | None


def trajectory_page(
    trajectory: Trajectory,
    pictures: Sequence[Image.Image],
    spent: Spent,
    facts: Mapping[str, str],
) -> str:
    """Return the HTML of one trajectory, pictures inside.

    Args:
      trajectory: as it was drawn.
      pictures: of its steps.
      spent: what it took.
      facts: shown at the end.

    Raises:
      ValueError: there are more or fewer pictures than steps.
    """
    uris = [png_uri(picture) for picture in pictures]
    small = [png_uri(picture, _SMALL) for picture in pictures]
    final = trajectory.final or len(uris)
    metadata = trajectory.metadata
    unfinished, closing = metadata.get("unfinished", {}), metadata.get("closing", {})
    steps = [
        _step(number, step, uris[number - 1], small, number == final)
        for number, step in zip(range(1, len(uris) + 1), trajectory.steps, strict=True)
    ]
    return page(
        "trajectory.html.jinja",
        title=trajectory.goal,
        answer=uris[final - 1],
        final=final,
        outcome=trajectory.outcome,
        end=ENDS[trajectory.outcome],
        error=metadata.get("error"),
        tiles=_tiles(spent),
        steps=steps,
        closing=_named(trajectory.closing),
        unfinished=_unfinished(unfinished),
        retries=[*unfinished.get("retries", []), *closing.get("retries", [])],
        last=_cost(unfinished or closing),  # of every turn that came after the last picture
        facts=list(facts.items()),
    )


def index_page(title: str, entries: Sequence[Entry], facts: Mapping[str, str]) -> str:
    """Return the HTML that leads to many trajectories, with a filter by how they ended.

    Args:
      title: above them.
      entries: in the order in which they are shown.
      facts: shown at the end.
    """
    outcomes = [outcome for outcome in ENDS if any(e.outcome == outcome for e in entries)]
    total = Spent(*(sum(column) for column in zip(*(e.spent for e in entries), strict=True)))
    return page(
        "trajectories.html.jinja",
        title=title,
        entries=entries,
        outcomes=[
            (outcome or "done", ENDS[outcome], _count(entries, outcome)) for outcome in outcomes
        ],
        tiles=_tiles(total),
        facts=list(facts.items()),
    )


def _count(entries: Sequence[Entry], outcome: str | None) -> int:
    return sum(entry.outcome == outcome for entry in entries)


def _tiles(spent: Spent) -> list[tuple[str, str]]:
    return [
        ("pictures", f"{spent.pictures}"),
        ("evaluations", f"{spent.evaluations:,}"),
        ("tokens", f"{spent.tokens:,}"),
        ("seconds", f"{spent.seconds:.1f}"),
    ]


def _unfinished(turn: Mapping[str, Any]) -> dict[str, str]:
    """The turn that came when there was no going on: what it said, and what it would have done."""
    if "reasoning" not in turn:
        return {}
    action = turn["action"]
    return {
        "reasoning": _named(turn["reasoning"]),
        "does": _DOES[action["kind"]],
        "prompt": _named(action["prompt"]),
    }


def _cost(metadata: Mapping[str, Any]) -> str:
    cost = [
        f"{metadata[name]:.1f} s {what}"
        for name, what in (("think_s", "thinking"), ("draw_s", "drawing"))
        if name in metadata
    ]
    cost += [f"{metadata[name]} {name}" for name in ("tokens", "evaluations") if name in metadata]
    return ", ".join(cost)


def _step(
    number: int, step: Step, picture: str, small: Sequence[str], final: bool
) -> dict[str, Any]:
    action, metadata = step.action, step.metadata
    references = action.references if action else ()
    return {
        "number": number,
        "reasoning": _named(step.reasoning),
        "does": _DOES[action.kind if action else None],
        "prompt": _named(action.prompt) if action else "",
        "references": [(n, small[n - 1]) for n in references],
        "picture": picture,
        "verdict": step.verdict,
        "retries": metadata.get("retries", []),
        "cost": _cost(metadata),
        "final": final,
    }


def _named(text: str) -> str:
    """A text with images called by their numbers."""
    return MARKER.sub(lambda match: f"picture {match[1]}", text)
