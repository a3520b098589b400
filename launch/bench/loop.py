"""The loop benchmark: whole trajectories, with both models' random weights on one device.

The loop, its backends and its grammar are the product's own; only what a turn says is scripted
(`launch.bench.speaker`). What the parts of a picture take is measured beside it.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp

from clvr_jax.backends.local.images import LocalImages
from clvr_jax.backends.local.reader import cache_places
from clvr_jax.backends.local.sequence import power
from clvr_jax.closed_loop import Budget, Loop, Result, Task
from clvr_jax.data.conditioning import Policy
from clvr_jax.models.qwen3.cache import token_bytes
from configs import vlm as vlm_config
from launch.bench import flops, image, machine, speaker, text
from launch.bench.timing import measure
from launch.drawing.options import options_of
from launch.runtime import compile_seconds

_GOAL = "two blue cups left of a red book on a round table of dark wood, a window behind it"
_WARM = 4  # most runs before those that are timed
_ROOM = 2048  # tokens of a conversation beside pictures and what is written


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      images: klein and how it samples; how many references it has is the loop's.
      vlm: a key of `text.MODELS`.
      generations: pictures of each kind of trajectory.
      tokens: that a turn writes.
      verdict: tokens of the last turn.
      references: an edit sees the last picture alone, or all before it.
      grammar: whether turns are decoded under the loop's grammar.
      together: trajectories drawn at the same time.
    """

    images: image.Case
    vlm: str
    generations: tuple[int, ...] = (1, 2, 6)
    tokens: int = 300
    verdict: int = 100
    references: str = "last"
    grammar: bool = True
    together: int = 1


class Bench:
    """Both models, and the trajectories that are timed."""

    def __init__(self, case: Case):
        cfg, settings = text.MODELS[case.vlm], case.images.settings
        self.case, self.vision, self.words = case, cfg.vision, cfg.text
        self.width = jnp.dtype(case.images.dtype).itemsize
        self.patches = settings.height * settings.width // cfg.vision.patch**2
        turn = self.patches // cfg.vision.cell + case.tokens
        context = _ROOM + max(case.generations) * turn + case.verdict
        self.token = token_bytes(cfg.text, self.width)
        rows = power(case.together)  # decoded together, while one more is read
        self.model = image.build(case.images)
        self.vlm = speaker.build(
            cfg,
            case.images.dtype,
            context=context,
            cache_bytes=(rows + 1) * cache_places(context) * self.token,
        )
        texts = (settings.text_tokens,)
        self.images = LocalImages(case.images.model, self.model, settings, texts, batch=rows)
        references = "all" if case.references == "all" else "chosen"
        self.policy = Policy(text="instruction", references=references, buckets=texts)

    def close(self) -> None:
        """End both models' threads."""
        self.images.close()
        self.vlm.close()

    def draw(self, generations: int) -> "Timed":
        """Draw trajectories at the same time, each of so many pictures.

        Raises:
          RuntimeError: one failed.
        """
        case = self.case
        script = speaker.Script(generations, case.tokens, case.verdict)
        says = speaker.Speaker(self.vlm, script)
        options = options_of(vlm_config.get_config())
        loop = Loop(
            says, self.images, self.policy, Budget(), None, options, case.grammar, retries=0
        )
        tasks = [Task(str(i), _GOAL, i) for i in range(case.together)]
        began = time.perf_counter()
        with ThreadPoolExecutor(len(tasks)) as pool:
            results = list(pool.map(loop.run, tasks))
        seconds = time.perf_counter() - began
        for result in results:
            if result.error or result.trajectory.outcome != "stopped":
                why = result.error or result.trajectory.outcome
                raise RuntimeError(f"a trajectory did not end as its script: {why}")
        return Timed(seconds, results, says.turns)

    def floor(self, timed: "Timed", limit: Mapping[str, Any]) -> float:
        """Return the least seconds of one trajectory alone: products at their limit's rate, and
        the weights and cache that decoding reads at the memory's.
        """
        flop, gigabytes = 0, 0.0
        weights, token = text.decode_bytes(self.words, self.width), self.token
        for number, (reply, _) in enumerate(timed.turns[0]):
            usage = reply.usage
            flop += self._reading(usage.prompt - usage.cached, usage.cached)
            if number:  # a picture is looked at
                flop += flops.vision(self.vision, self.patches)
            held = usage.prompt + usage.completion / 2
            gigabytes += usage.completion * (weights + held * token) / 1e9
        for step in timed.results[0].trajectory.steps:
            given = len(step.metadata["given"])
            flop += sum(image.costs(self.model.networks, self.case.images.settings, given).values())
        return flop / limit["limit_tflops"] / 1e12 + gigabytes / limit["limit_gb_s"]

    def _reading(self, new: int, cached: int) -> int:
        cfg = self.words
        kept = 4 * new * cached * cfg.heads * cfg.head_width * cfg.layers
        return flops.text_encoder(cfg, new) + kept


@dataclasses.dataclass(frozen=True)
class Timed:
    """Trajectories drawn at the same time.

    Attributes:
      seconds: until all were done.
      results: of each.
      turns: of each.
    """

    seconds: float
    results: list[Result]
    turns: list[list[speaker.Said]]

    def means(self) -> list[dict[str, float]]:
        """Return of each turn, and the picture that it asked for, tokens and milliseconds."""
        found = []
        for number, said in enumerate(zip(*self.turns, strict=True)):
            steps = [result.trajectory.steps[number : number + 1] for result in self.results]
            drew = [step.metadata["draw_s"] for each in steps for step in each]
            usage, times = [s.reply.usage for s in said], [s.reply.times for s in said]
            ms = lambda values: 1e3 * statistics.fmean(values)
            found.append(
                {
                    "prompt_tokens": statistics.fmean(u.prompt - u.cached for u in usage),
                    "new_tokens": statistics.fmean(u.completion for u in usage),
                    "prepare_ms": ms(s.prepare for s in said),
                    "queued_ms": ms(t.queued for t in times),
                    "prefill_ms": ms(t.prefill for t in times),
                    "decode_ms": ms(t.decode for t in times),
                    "constrain_ms": ms(t.constrain for t in times),
                    "draw_ms": ms(drew or [0.0]),
                }
            )
        return found


def run(case: Case, repeat: int) -> dict[str, Any]:
    """Measure a case; return the report of the result file.

    Args:
      case: what to measure.
      repeat: timed trajectories of each length.

    Raises:
      RuntimeError: a trajectory failed.
    """
    bench = Bench(case)
    limit = {**machine.limits(case.images.dtype), **machine.memory_rate()}
    try:
        measured = {str(n): _measured(bench, n, repeat, limit) for n in case.generations}
    finally:
        bench.close()
    parts = {}
    for references in (0, 1):
        shapes = dataclasses.replace(case.images, references=references)

        def part(name: str, call: Any, cost: int, references: int = references) -> Any:
            timings, results = measure({"ours": call}, repeat)
            described = image.describe(timings["ours"], cost, limit)
            parts[f"{name}, {references} references"] = described
            return results["ours"]

        image.components(bench.model, shapes, part)
    return {
        "case": dataclasses.asdict(case),
        "limits": limit,
        "trajectories": measured,
        "parts": parts,
        "memory": machine.memory(),
    }


def _measured(
    bench: Bench, generations: int, repeat: int, limit: Mapping[str, Any]
) -> dict[str, Any]:
    """The report of one length."""
    with compile_seconds() as compiled:
        for _ in range(_WARM):  # which shapes meet depends on timing where several are drawn
            before = compiled()
            bench.draw(generations)
            if compiled() == before:
                break
        spent = compiled()
    timed = [bench.draw(generations) for _ in range(repeat)]
    seconds = statistics.median(each.seconds for each in timed)
    kinds = zip(*(each.means() for each in timed), strict=True)
    turns = [
        {name: round(statistics.median(t[name] for t in same), 3) for name in same[0]}
        for same in kinds
    ]
    report = {
        "seconds": round(seconds, 4),
        "min_s": round(min(each.seconds for each in timed), 4),
        "compile_s": round(spent, 3),
        "trajectories_per_minute": round(60 * bench.case.together / seconds, 3),
        "turns": turns,
    }
    if bench.case.together == 1:
        floor = bench.floor(timed[0], limit)
        report |= {"floor_s": round(floor, 4), "share_of_limit": round(floor / seconds, 4)}
    return report


def show(report: dict[str, Any]) -> None:
    """Print a loop report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    env, limit, case = report["environment"], report["limits"], report["case"]
    settings, drawing = case["images"]["settings"], case["images"]
    console.print(
        f"{drawing['model']} and {case['vlm']}, {drawing['dtype']}, {settings['height']}x"
        f"{settings['width']}, {settings['steps']} steps, guidance {settings['guidance']}, "
        f"{case['tokens']} tokens a turn and {case['verdict']} at the end "
        f"({'under the grammar' if case['grammar'] else 'free'}), edits see "
        f"{'the last picture' if case['references'] == 'last' else 'all before'}, "
        f"{case['together']} together",
        highlight=False,
    )
    console.print(f"{env['device']}, {env['processor']}, {machine.versions(env)}", highlight=False)
    table = Table(
        caption=f"tokens and milliseconds; limits {limit['limit_tflops']:.3g} TFLOP/s "
        f"({limit['limit_is']}), {limit['limit_gb_s']:.4g} GB/s ({limit['bandwidth_is']})"
    )
    for name in ("pictures", "turn"):
        table.add_column(name)
    columns = {
        "prompt_tokens": "new prompt",
        "new_tokens": "written",
        "prepare_ms": "prepare",
        "queued_ms": "queued",
        "prefill_ms": "prefill",
        "decode_ms": "decode",
        "constrain_ms": "masks of it",
        "draw_ms": "draw",
    }
    for name in columns.values():
        table.add_column(name, justify="right")
    for generations, one in report["trajectories"].items():
        for number, turn in enumerate(one["turns"], 1):
            values = [f"{turn[c]:.1f}" if c.endswith("_ms") else f"{turn[c]:.0f}" for c in columns]
            table.add_row(generations if number == 1 else "", str(number), *values)
    console.print(table)
    for generations, one in report["trajectories"].items():
        floor = (
            f", floor {one['floor_s']:.3f} s: {one['share_of_limit']:.1%} of the limit"
            if "floor_s" in one
            else ""
        )
        console.print(
            f"{generations} pictures: {one['seconds']:.3f} s, {one['trajectories_per_minute']:.3g} "
            f"trajectories a minute{floor}; compiled in {one['compile_s']:.1f} s",
            highlight=False,
        )
    for name, part in report["parts"].items():
        console.print(
            f"{name}: {part['median_ms']:.2f} ms, {part['share_of_limit']:.1%} of the limit",
            highlight=False,
        )
    memory = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in report["memory"].items())
    console.print(memory, highlight=False)
