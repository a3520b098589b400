"""`python -m launch.generate` in the modes that ask a vision-language model."""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import clvr_jax
from clvr_jax.backends.images import ImageGenerator
from clvr_jax.backends.local import LocalVlm
from clvr_jax.backends.protocol import Options, Vlm
from clvr_jax.backends.requests import CONTROL
from clvr_jax.closed_loop import Budget, Loop
from clvr_jax.closed_loop.baselines import BestOf, Rewrite, Single
from clvr_jax.data.conditioning import Policy
from launch import build, build_vlm
from launch.drawing import folder, models, placement
from launch.drawing.run import check
from launch.drawing.run import draw as draw_all
from launch.drawing.show import Show
from launch.plan import targets
from launch.runtime import compile_seconds

_STOCK = Path(clvr_jax.__file__).parent / "closed_loop" / "stock.txt"


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
    say = lambda text: print(text, file=sys.stderr, flush=True)
    tasks = folder.tasks(prompts, seeds)
    models.check_words(prompts, (sources.weights, sources.vlm))
    sized = placement.sized(sources.weights) if dry_run else None
    weights = sized or build.inspect_weights(sources.weights, sources.transformer)
    policy, budget, system = models.policy_of(weights), budget_of(config), system_of(config)
    speaker = None
    if sources.vlm and sources.vlm != models.TEACHER:
        speaker = placement.sized_vlm(sources.vlm) if dry_run else None
        speaker = speaker or build_vlm.find(sources.vlm)
    found = placement.place(
        weights,
        speaker,
        models.settings_of(weights, config),
        config,
        vlm_config,
        targets.parse(target if dry_run else targets.HERE),
    )
    if dry_run:
        print(found.table())
        found.require()
        return
    settings = {
        "mode": mode,
        "weights": build.weight_fingerprint(weights),
        "vlm": sources.vlm or (f"{sources.name} at {sources.server}" if sources.server else None),
        "config": config.to_dict() | {"mesh": None},
        "vlm_config": vlm_config.to_dict() | {"mesh": None, "remote": None},
    }
    check(out, tasks, settings, resume)
    found.require()
    say(found.table())
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
                settings,
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
        raise SystemExit(1)


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
        return Single(images)
    if mode == "best_of":
        return BestOf(images, vlm, config.loop.best_of, options)
    if mode == "rewrite":
        return Rewrite(images, vlm, options)
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


def budget_of(config: Any) -> Budget:
    """Return the budget of a config; -1 is no limit."""
    loop = config.loop
    limit = lambda value: None if value == -1 else value
    return Budget(
        loop.generations,
        limit(loop.seconds),
        limit(loop.evaluations),
        limit(loop.tokens),
        loop.look,
    )


def system_of(config: Any) -> str | None:
    """Return the system message of a config.

    Raises:
      FileNotFoundError: it is neither a known name nor a file.
    """
    known = {"control": CONTROL, "stock": None, "none": None}
    name = config.loop.system
    if name not in known and not Path(name).is_file():
        raise FileNotFoundError(f"system is {name!r}; choose {', '.join(known)} or a file's path")
    if name == "stock":
        return _STOCK.read_text().strip()
    return known[name] if name in known else Path(name).read_text().strip()


def options_of(config: Any) -> Options:
    """Return how turns are generated by a config of configs/vlm.py; seeds come from the tasks."""
    return Options(
        max_tokens=config.max_tokens,
        temperature=float(config.temperature),
        top_p=float(config.top_p),
        top_k=config.top_k,
        presence_penalty=float(config.presence_penalty),
    )
