"""The miniature's own benchmark: prompts, edits and the VAE, on splits of the world of shapes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clvr_jax.backends.protocol import Vlm
from clvr_jax.miniature import detect, detect_eval, samples, scenes, scores
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.pictures import picture_of, rendered, stacked
from clvr_jax.miniature.prompts import KINDS, Prompt
from clvr_jax.miniature.readings import Readings, agreement
from clvr_jax.miniature.splits import prompts
from clvr_jax.statistics import rate
from launch.evaluation import reading
from launch.evaluation.sampling import Draw, Job, draw_all, groups, total_speed

_RENDERS = 20_260_200  # seed of the scenes that show the VAE's ceiling
_CHUNK = 128  # pictures rendered or encoded at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
      split: of the world.
      count: prompts of each kind, from the first; 0 for all.
      edits: edits of each kind; 0 for none.
      renders: scenes through the VAE; 0 for none.
      seed: added to the seeds of all pictures.
      batch: pictures of a call at most.
      readings: renders that a vision-language model reads, and as many drawn pictures.
    """

    split: Split
    count: int = 0
    edits: int = 200
    renders: int = 500
    seed: int = 0
    batch: int = 50
    readings: int = 300

    def __post_init__(self):
        if (
            min(self.count, self.edits, self.renders, self.seed) < 0
            or min(self.batch, self.readings) < 1
        ):
            raise ValueError(f"{self}: numbers must not be negative, batch and readings at least 1")


class Parts(NamedTuple):
    """What is evaluated, as functions.

    Attributes:
      draw: draws a batch.
      tokens: returns the lengths of texts, template included.
      bucket: returns the text length for a number of tokens.
      recode: takes pictures through the VAE and back.
      buckets: all text lengths.
    """

    draw: Draw
    tokens: Callable[[list[str]], list[int]]
    bucket: Callable[[int], int]
    recode: Callable[[np.ndarray], np.ndarray]
    buckets: tuple[int, ...]


class Drawn(NamedTuple):
    """A part of the evaluation with what it was made from.

    Attributes:
      report: numbers, for the result file.
      asked: prompts or cases of edits.
      given: pictures given to each, for edits.
      pictures: drawn.
      verdicts: on each.
      readings: of the evaluation detector.
    """

    report: dict[str, Any]
    asked: list[Any]
    given: list[tuple[np.ndarray, ...]]
    pictures: np.ndarray
    verdicts: list[Any]
    readings: Readings


class Ceiling(NamedTuple):
    """What the VAE alone keeps.

    Attributes:
      report: numbers, for the result file.
      before: renders.
      after: the same, through the VAE and back.
      exact: whether the evaluation detector reads `after` as the scene it shows.
    """

    report: dict[str, Any]
    before: np.ndarray
    after: np.ndarray
    exact: np.ndarray


class Evaluation(NamedTuple):
    """All parts; edits, ceiling and reading are None if not asked for."""

    prompts: Drawn
    edits: Drawn | None
    ceiling: Ceiling | None
    reading: dict[str, Any] | None


def evaluate(parts: Parts, plan: Plan, vlm: Vlm | None = None) -> Evaluation:
    """Evaluate all that is planned, and a model that reads pictures where one is given."""
    ceiling = vae_ceiling(parts, plan) if plan.renders else None
    drawn = draw_prompts(parts, plan)
    edited = draw_edits(parts, plan) if plan.edits else None
    return Evaluation(drawn, edited, ceiling, vlm and read_pictures(vlm, plan, drawn))


def read_pictures(vlm: Vlm, plan: Plan, drawn: Drawn) -> dict[str, Any]:
    """Return how a model reads renders, and pictures that were drawn; of all kinds alike."""
    asked = _spread(prompts(plan.split), plan.readings)
    seen = reading.of_drawn(drawn.pictures, drawn.readings, drawn.asked, drawn.verdicts)
    return {
        "renders": reading.measure(vlm, reading.of_renders(asked), "reading renders"),
        "drawn": reading.measure(vlm, _spread(seen, plan.readings), "reading drawn pictures"),
    }


def _spread(listed: Sequence[Any], most: int) -> list[Any]:
    """At most so many of a list, from all of its parts."""
    stride = max(len(listed) / most, 1)
    return [listed[int(i * stride)] for i in range(min(most, len(listed)))]


def draw_prompts(parts: Parts, plan: Plan) -> Drawn:
    """Draw the prompts of a split, a picture each, and judge them."""
    numbered = chosen(plan.split, plan.count)
    asked = [prompt for _, prompt in numbered]
    jobs = [Job(prompt.text, number + plan.seed) for number, prompt in numbered]
    pictures, speed = _draw(parts, plan, jobs, "prompts")
    readings, other = detect_eval.detect(pictures), detect.detect(pictures)
    verdicts = [scores.judge(prompt.goal, readings, i) for i, prompt in enumerate(asked)]
    passed = np.array([verdict.passed for verdict in verdicts])
    also = np.array([scores.judge(p.goal, other, i).passed for i, p in enumerate(asked)])
    report = {
        **scores.prompt_report(asked, verdicts),
        "speed": {**total_speed(speed), "shapes": speed},
        "agreement": {**agreement(readings, other), "verdicts": float(np.mean(passed == also))},
        "items": [
            {
                "number": number,
                "kind": prompt.kind,
                "complexity": round(prompt.complexity, 3),
                "prompt": prompt.text,
                "seed": job.seed,
                **verdict._asdict(),
                "passed_by_other_detector": bool(other_passed),
                "codes": readings.codes[i].tolist(),
            }
            for i, ((number, prompt), job, verdict, other_passed) in enumerate(
                zip(numbered, jobs, verdicts, also, strict=True)
            )
        ],
    }
    return Drawn(report, asked, [()] * len(asked), pictures, verdicts, readings)


def draw_edits(parts: Parts, plan: Plan) -> Drawn:
    """Draw edits of renders of true scenes, all kinds, and judge them."""
    per_kind = {kind: scores.edit_cases(plan.split, kind, plan.edits) for kind in scores.EDITS}
    asked = [case for cases in per_kind.values() for case in cases]
    numbers = [i for cases in per_kind.values() for i in range(len(cases))]
    flat = [picture for case in asked for picture in case.shown]
    shown = iter(rendered(flat, _CHUNK))
    given = [tuple(next(shown) for _ in case.shown) for case in asked]
    jobs = [
        Job(case.text, number + plan.seed, pictures)
        for case, number, pictures in zip(asked, numbers, given, strict=True)
    ]
    pictures, speed = _draw(parts, plan, jobs, "edits")
    readings = detect_eval.detect(pictures)
    verdicts = [scores.judge_edit(case, readings, i) for i, case in enumerate(asked)]
    report = {
        **scores.edit_report(asked, verdicts),
        "speed": {**total_speed(speed), "shapes": speed},
        "items": [
            {
                "number": number,
                "kind": case.kind,
                "instruction": case.text,
                "seed": job.seed,
                **verdict._asdict(),
                "given": [picture.codes.tolist() for picture in case.shown],
                "codes": readings.codes[i].tolist(),
            }
            for i, (number, case, job, verdict) in enumerate(
                zip(numbers, asked, jobs, verdicts, strict=True)
            )
        ],
    }
    return Drawn(report, asked, given, pictures, verdicts, readings)


def vae_ceiling(parts: Parts, plan: Plan) -> Ceiling:
    """Return the shares of scenes read exactly before and after the VAE, by both detectors.

    No picture that a transformer draws can be expected to be better than these.
    """
    drawn = []
    for number in range(plan.renders):
        rng = samples.generator(_RENDERS, number)
        scene = scenes.sample(rng, plan.split)
        drawn.append(picture_of(scene, rng))
    codes, _ = stacked(drawn)
    before = rendered(drawn, _CHUNK)
    after = np.concatenate(
        [
            # rows repeat up to a whole chunk, so that one program serves all
            parts.recode(np.resize(before[i : i + _CHUNK], (_CHUNK, *before.shape[1:])))[
                : len(before) - i
            ]
            for i in range(0, len(before), _CHUNK)
        ]
    )
    report: dict[str, Any] = {"scenes": plan.renders}
    for name, pictures in (("renders", before), ("recoded", after)):
        exact = scores.exact(detect_eval.detect(pictures), codes)
        reward = scores.exact(detect.detect(pictures), codes)
        report[name] = {"evaluation": rate(exact), "reward": rate(reward)}
    error = np.abs(before.astype(int) - after)
    report["mean_error_levels"] = round(float(error.mean()), 3)
    return Ceiling(report, before, after, exact)


def chosen(split: Split, count: int) -> list[tuple[int, Prompt]]:
    """Return the first `count` prompts of each kind, 0 for all, with their numbers in the split."""
    numbered = list(enumerate(prompts(split)))
    of = lambda kind: [(i, prompt) for i, prompt in numbered if prompt.kind == kind]
    return [each for kind in KINDS for each in of(kind)[: count or None]]


def _draw(parts: Parts, plan: Plan, jobs: list[Job], what: str) -> tuple[np.ndarray, list[Any]]:
    """The pictures of jobs, and what each group of them took."""
    tokens = parts.tokens([job.text for job in jobs])
    found = groups(jobs, tokens, parts.bucket, plan.batch)
    return draw_all(parts.draw, jobs, found, what)
