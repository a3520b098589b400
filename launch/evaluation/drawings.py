"""Folders of drawings compared: which way of drawing passes more of the same prompts, and why.

An arm is a folder that `launch.generate` has written for prompts of the miniature's world. Arms are
compared on the prompts and seeds that they share; every picture is judged by the evaluation's
detector, which no way of drawing has seen.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.closed_loop.budget import MOST_GENERATIONS
from clvr_jax.closed_loop.result import answer_within, spent_within
from clvr_jax.data.trajectory import Trajectory
from clvr_jax.miniature import detect_eval, scores
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.prompts import KINDS, complexity, tier
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.splits import prompts
from clvr_jax.statistics import holm, mcnemar, paired_difference, rate, rate_of
from launch.drawing.folder import RESULT, TRAJECTORY

Key = tuple[str, int]  # prompt and seed
SPENT = ("evaluations", "tokens", "seconds")


class Drawing(NamedTuple):
    """One prompt as one arm drew it.

    Attributes:
      passed: of each picture, whether it is all that was asked for.
      final: index of the answer; None if there is no picture.
      outcome: why it ended.
      seconds, evaluations, tokens: what it took.
      within: index of the answer, had the budget been 1, 2, ... pictures; of loops only.
      spent: what had been spent then.
    """

    passed: tuple[bool, ...]
    final: int | None
    outcome: str | None
    seconds: float
    evaluations: int
    tokens: int
    within: tuple[int, ...] = ()
    spent: tuple[dict[str, int | float], ...] = ()

    @property
    def right(self) -> bool:
        """Whether the answer passes."""
        return self.final is not None and self.passed[self.final]


def read(folder: Path) -> dict[Key, Drawing]:
    """Return what a folder of drawings holds, judged.

    Raises:
      FileNotFoundError: it holds none.
      ValueError: a prompt is not of the miniature's world, or a picture of another size.
    """
    records = []
    for file in sorted(folder.glob(f"*/{RESULT}")):
        known, beside = json.loads(file.read_text()), file.with_name(TRAJECTORY)
        pictures, within, spent = [], (), ()
        if beside.exists():
            trajectory = Trajectory.model_validate_json(beside.read_text())
            pictures = [_picture(file.with_name(step.image)) for step in trajectory.steps]
            if trajectory.metadata.get("mode") == "loop":
                budgets = range(1, MOST_GENERATIONS + 1)
                within = tuple(answer_within(trajectory, n) - 1 for n in budgets)
                spent = tuple(spent_within(trajectory, n) for n in budgets)
        records.append((known, pictures, within, spent))
    if not records:
        raise FileNotFoundError(f"{folder} holds no drawings of launch.generate")
    shown = [picture for _, pictures, *_ in records for picture in pictures]
    readings = detect_eval.detect(np.stack(shown)) if shown else None
    found, at = {}, 0
    for known, pictures, within, spent in records:
        goal = parse_prompt(known["goal"])
        passed = tuple(scores.judge(goal, readings, at + i).passed for i in range(len(pictures)))
        at += len(pictures)
        found[known["goal"], known["seed"]] = Drawing(
            passed,
            known["final"] - 1 if known["final"] else None,
            known["outcome"],
            known["seconds"],
            known["evaluations"],
            known["tokens"],
            within,
            spent,
        )
    return found


def _picture(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"{file} is {image.size[0]}x{image.size[1]}; {SIDE}x{SIDE} is needed")
        return np.asarray(image.convert("RGB"))


def compare(arms: Mapping[str, Mapping[Key, Drawing]], against: str) -> dict[str, Any]:
    """Return rates of every arm and its paired difference to one of them.

    Args:
      arms: by name.
      against: the one that all others are compared with; differences are it less the other.

    Raises:
      ValueError: there is no such arm, or they share no prompt.
    """
    if against not in arms:
        raise ValueError(f"no arm is called {against!r}; there are {', '.join(arms)}")
    shared = [key for key in arms[against] if all(key in arm for arm in arms.values())]
    if not shared:
        raise ValueError("the arms share no prompt with the same seed")
    groups = _groups(shared)
    rows = {name: [arm[key] for key in shared] for name, arm in arms.items()}
    right = {name: np.array([d.right for d in row]) for name, row in rows.items()}
    others = [name for name in arms if name != against]
    p_values = holm([mcnemar(right[against], right[name]) for name in others]) if others else []
    differences = {}
    for name, p in zip(others, p_values, strict=True):
        both = right[against], right[name]
        differences[name] = {
            "all": paired_difference(*both),
            "p_holm": float(p),
            "groups": {g: paired_difference(*(r[at] for r in both)) for g, at in groups.items()},
        }
    return {
        "prompts": len(shared),
        "left_out": {name: len(arm) - len(shared) for name, arm in arms.items()},
        "against": against,
        "arms": {
            name: {
                "passed": rate(right[name]),
                "groups": {group: rate(right[name][at]) for group, at in groups.items()},
                **_manner(row),
            }
            for name, row in rows.items()
        },
        "differences": differences,
    }


def _groups(keys: Sequence[Key]) -> dict[str, list[int]]:
    """Indices of prompts by kind, where it is known, and by tier."""
    kinds: dict[str, str] = {}
    for split in (Split.DEV, Split.HELD_OUT, Split.TEST):  # as long as they take to be made
        if any(text not in kinds for text, _ in keys):
            kinds |= {prompt.text: prompt.kind for prompt in prompts(split)}
    named: dict[str, list[int]] = {}
    for index, (text, _) in enumerate(keys):
        named.setdefault(kinds.get(text, "other"), []).append(index)
    ordered = {kind: named[kind] for kind in (*KINDS, "other") if kind in named}
    tiers: dict[int, list[int]] = {}
    for index, (text, _) in enumerate(keys):
        tiers.setdefault(tier(complexity(parse_prompt(text), text)), []).append(index)
    return ordered | {f"tier {n}: {scores.tier_name(n)}": tiers[n] for n in sorted(tiers)}


def _manner(row: Sequence[Drawing]) -> dict[str, Any]:
    """How an arm draws: lengths, costs, ends, and whether it knows when to stop."""
    lengths = Counter(len(d.passed) for d in row)
    stopped = [d for d in row if d.outcome == "stopped"]
    looked = [d for d in row if d.outcome not in (None, "failed")]
    # pictures that were right, and were not stopped at
    satisfied = [
        (i == len(d.passed) - 1 and d.outcome == "stopped")
        for d in looked
        for i, passed in enumerate(d.passed)
        if passed
    ]
    mean = lambda values: float(np.mean(list(values)))
    return {
        "outcomes": dict(Counter(d.outcome or "done" for d in row)),
        "lengths": {str(n): lengths[n] for n in sorted(lengths)},
        "pictures": mean(len(d.passed) for d in row),
        "evaluations": mean(d.evaluations for d in row),
        "tokens": mean(d.tokens for d in row),
        "seconds": mean(d.seconds for d in row),
        "by_own_decision": rate_of(len(stopped), len(row)),
        "stopped_unsatisfied": rate(not d.right for d in stopped),
        "edited_though_right": rate(not kept for kept in satisfied),
        "budgets": _budgets(row),
        "ever_right": rate(any(d.passed) for d in row),
    }


def _budgets(row: Sequence[Drawing]) -> dict[str, Any]:
    """What a loop would have passed, drawn and spent, had its budget been 1, 2, ... pictures."""
    if not any(d.within for d in row):
        return {}
    return {
        str(n): {
            "passed": rate(bool(d.within) and d.passed[d.within[n - 1]] for d in row),
            "pictures": float(np.mean([min(n, len(d.passed)) for d in row])),
            **{
                # one that failed before its first picture has spent what it has spent
                name: float(
                    np.mean([d.spent[n - 1][name] if d.spent else getattr(d, name) for d in row])
                )
                for name in SPENT
            },
        }
        for n in range(1, MOST_GENERATIONS + 1)
    }
