"""`python -m launch.generate` in the modes that ask a vision-language model."""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from clvr_jax.backends.images import ImageGenerator
from clvr_jax.backends.local import LocalVlm
from clvr_jax.backends.protocol import Options, Vlm
from clvr_jax.closed_loop import Budget, Loop
from clvr_jax.closed_loop.baselines import BestOf, Rewrite, Single
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.trajectory import check_goal
from conversion.components import Component
from conversion.detect import SHIPPED
from conversion.sources import fingerprint
from launch import build, build_vlm
from launch.drawing import folder, models, placement
from launch.drawing.options import budget_of, check_mode, options_of, references_of, system_of
from launch.drawing.run import check
from launch.drawing.run import draw as draw_all
from launch.drawing.show import Show
from launch.plan import targets
from launch.runtime import compile_seconds


class Sources(NamedTuple):
    """Where models come from; see the flags of launch.generate."""

    weights: str
    transformer: str | None
    vlm: str | None
    server: str | None
    name: str
    key_env: str | None


def draw(
    mode: str,
    prompts: list[str],
    seeds: list[int],
    out: Path,
    sources: Sources,
    config: Any,
    vlm_config: Any,
    resume: bool,
    dry_run: bool,
    target: str,
) -> None:
    """Check what can be checked, load both models, draw every prompt with every seed.

    Args:
      mode: loop, best_of, rewrite or one_shot.
      prompts, seeds: each with each.
      out: folder of all.
      sources: of the models.
      config: of configs/generate.py.
      vlm_config: of configs/vlm.py.
      resume: go on with what is in `out`.
      dry_run: print what the models take of `target`, and stop.
      target: name of a machine, for `dry_run`; otherwise it is this one.

    Raises:
      ValueError, OSError: something is not as it must be.
      SystemExit: with 1, if a prompt failed.
    """
    start = time.perf_counter()
    for prompt in prompts:
        check_goal(prompt)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    tasks = folder.tasks(prompts, seeds)
    models.check_words(prompts, (sources.weights, sources.vlm))
    sized = placement.sized(sources.weights) if dry_run else None
    weights = sized or build.inspect_weights(sources.weights, sources.transformer)
    policy, budget = models.policy_of(weights), budget_of(config)
    ours = sources.vlm == models.TEACHER or sources.vlm in SHIPPED
    named, system = system_of(config, ours or "conditioning" in weights.found.manifest)
    settings = models.settings_of(weights, config)
    check_mode(mode, config, settings.evaluations)
    speaker, references = None, references_of(policy, budget) if mode == "loop" else 0
    if sources.vlm and sources.vlm != models.TEACHER:
        speaker = placement.sized_vlm(sources.vlm) if dry_run else None
        speaker = speaker or build_vlm.find(sources.vlm)
    found = placement.place(
        weights,
        speaker,
        settings,
        references,
        config,
        vlm_config,
        targets.parse(target if dry_run else targets.HERE),
    )
    if dry_run:
        print(found.table())
        found.require()
        return
    about = {
        "mode": mode,
        "weights": build.weight_fingerprint(weights),
        "vlm": _named(sources, speaker),
        "system": f"{named} {hashlib.sha256((system or '').encode()).hexdigest()[:12]}",
        "config": config.to_dict(),
        "vlm_config": vlm_config.to_dict(),
    }
    check(out, tasks, about, resume)
    found.require()
    say(found.table())
    if mode == "loop":
        say(f"the language model is told its part by the system message {named!r}")
    vlm = None
    if sources.server:
        vlm = models.remote(sources.server, sources.name, sources.key_env, vlm_config)
    elif sources.vlm:
        vlm = models.vlm(sources.vlm, vlm_config, cache=found.cache)
    images = models.images(weights, config, Path(sources.weights).name)
    names = " and ".join([images.name, *([vlm.name] if vlm else [])])
    say(f"{names}: loaded in {time.perf_counter() - start:.1f} s")
    work = worker(mode, vlm, images, policy, budget, system, config, options_of(vlm_config))
    try:
        with compile_seconds() as compiled:
            results, page = draw_all(
                lambda task, tell: work.run(task, tell),
                tasks,
                out,
                about,
                f"{len(tasks)} prompts, {mode}",
                min(config.loop.concurrency, len(tasks)),
                Show(len(tasks)),
            )
            if compiled() > 1:
                say(f"{compiled():.1f} s of it compiling, less next time: programs are kept")
    finally:
        images.close()
        if vlm:
            vlm.close()
    print(page)
    failed = [result.task.id for result in results if result.error]
    if failed:
        say(f"error: {len(failed)} of {len(results)} prompts failed: {', '.join(failed[:5])}")
        raise SystemExit(folder.SOME_FAILED)


def _named(sources: Sources, speaker: Component | None) -> str | None:
    """The vision-language model, so that another one under the same name is told from it."""
    if sources.server:
        return f"{sources.name} at {sources.server}"
    if speaker is None:
        return sources.vlm
    weights = fingerprint(speaker.open(), speaker.abstract(), speaker.stacked)
    return f"{sources.vlm} {weights}"


def worker(
    mode: str,
    vlm: Vlm | None,
    images: ImageGenerator,
    policy: Policy,
    budget: Budget,
    system: str | None,
    config: Any,
    options: Options,
) -> Loop | BestOf | Rewrite | Single:
    """Return what draws in a mode.

    Raises:
      ValueError: constrain is unknown.
    """
    if mode == "one_shot":
        return Single(images, budget.evaluations)
    if mode == "best_of":
        return BestOf(images, vlm, config.loop.best_of, options, budget.evaluations)
    if mode == "rewrite":
        return Rewrite(images, vlm, options, budget.evaluations)
    known = {"always": True, "never": False, "auto": isinstance(vlm, LocalVlm)}
    if config.loop.constrain not in known:
        raise ValueError(f"constrain is {config.loop.constrain!r}; choose from {', '.join(known)}")
    return Loop(
        vlm,
        images,
        policy,
        budget,
        system,
        options,
        known[config.loop.constrain],
        config.loop.retries,
    )
