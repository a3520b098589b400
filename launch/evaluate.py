"""Evaluate weights on a benchmark: pass rates with intervals, and a page of pictures.

python -m launch.evaluate miniature --weights=FOLDER --split=test [--vlm=FOLDER]
python -m launch.evaluate prompts --split=test > test.txt         # for launch.generate
python -m launch.evaluate drawings --arm=loop=FOLDER --arm=single=FOLDER --against=loop

Writes results.json (every number, every verdict) and index.html (tables and pictures to open in a
browser) into a folder; `prompts` prints.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

FILES = ("results.json", "index.html")  # what the folder holds


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _miniature_options(
        benchmarks.add_parser(
            "miniature",
            help="prompts, edits and VAE on the world of shapes, pictures of 64x64",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    some = benchmarks.add_parser("prompts", help="print the prompts of a split, a line each")
    some.add_argument("--split", default="test", choices=("test", "dev", "held_out", "train"))
    some.add_argument("--count", type=int, default=0, help="of each kind; 0: all, if it has an end")
    ways = benchmarks.add_parser(
        "drawings", help="folders of launch.generate compared, prompt by prompt"
    )
    ways.add_argument(
        "--arm", action="append", default=[], metavar="NAME=FOLDER", help="may be repeated"
    )
    ways.add_argument("--against", help="arm that others are compared with (the first)")
    ways.add_argument("--out", help="folder to write (outputs/drawings-DATE-TIME if not given)")
    ways.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    options = parser.parse_args(argv)
    from launch.runtime import readable_errors

    with readable_errors():
        commands = {"miniature": _miniature, "prompts": _prompts, "drawings": _drawings}
        return commands[options.benchmark](options)


def _miniature_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", default="miniature", help="pipeline or run folder, or hub id")
    add("--split", default="test", choices=("test", "dev", "held_out"), help="of the world")
    add("--count", type=int, default=0, help="prompts of each kind; 0: all")
    add("--edits", type=int, default=200, help="edits of each kind; 0: none")
    add("--renders", type=int, default=500, help="scenes through the VAE; 0: none")
    add("--vlm", default="", help="Qwen3-VL folder: how well it reads pictures is measured too")
    add("--readings", type=int, default=300, help="renders it reads, and as many drawn pictures")
    add("--steps", type=int, default=28, help="of the sampler")
    add("--guidance", type=float, default=4.0, help="1: none, as distilled weights want it")
    add("--seed", type=int, default=0, help="added to the number of each prompt")
    add("--batch", type=int, default=50, help="pictures drawn together, at most")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the weights")
    add("--out", help="folder to write (outputs/miniature-SPLIT-DATE-TIME if not given)")
    add("--overwrite", action="store_true", help="replace the results in --out")


def _miniature(options: argparse.Namespace) -> int:
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = Path(options.out or f"outputs/miniature-{options.split}-{stamp}")
    check_out(out, options.overwrite)
    if options.steps < 1 or options.guidance < 1:
        raise ValueError(
            f"steps {options.steps} and guidance {options.guidance} must each be at least 1 "
            "(guidance 1 means none)"
        )
    from launch.runtime import use_compile_cache

    use_compile_cache()
    from clvr_jax.miniature.held_out import Split
    from launch import build, build_vlm
    from launch.bench import machine
    from launch.evaluation import miniature, page, pipeline, view

    plan = miniature.Plan(
        Split(options.split),
        options.count,
        options.edits,
        options.renders,
        options.seed,
        options.batch,
        options.readings,
    )
    reader = build_vlm.find(options.vlm) if options.vlm else None
    weights = build.inspect_weights(options.weights)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if weights.distilled and options.guidance != 1.0:
        say("note: these weights are distilled; they want --steps=4 --guidance=1")
    make_out(out)
    environment = machine.environment("launch.evaluate")
    model = build.load_image_model(weights, dtype=build.resolve_dtype(options.dtype))
    parts = pipeline.parts_of(weights, model, options.steps, options.guidance)
    vlm = reader and build_vlm.load_vlm(reader, dtype=build.resolve_dtype(options.dtype))
    try:
        evaluation = miniature.evaluate(parts, plan, vlm)
    finally:
        if vlm:
            vlm.close()
    about = {
        "benchmark": "miniature",
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "overwrite")},
        "weights": {
            "path": str(weights.found.path),
            "kind": weights.found.kind,
            "fingerprints": pipeline.fingerprints(weights),
            "text_lengths": list(parts.buckets),
        },
        "environment": environment,
    }
    view.show(evaluation)
    view.write(out / FILES[0], about, evaluation)
    page.write(out / FILES[1], about, evaluation)
    print(out / FILES[1])
    return 0


def _prompts(options: argparse.Namespace) -> int:
    from clvr_jax.miniature.held_out import Split
    from clvr_jax.miniature.splits import training
    from launch.evaluation import miniature

    if options.count < 0:
        raise ValueError(f"--count={options.count}; it must not be negative")
    if options.split != "train":
        found = [prompt for _, prompt in miniature.chosen(Split(options.split), options.count)]
    elif options.count:
        found = training(options.count)
    else:
        raise ValueError("the train split has no end: give --count, prompts of each kind")
    for prompt in found:
        print(prompt.text)
    return 0


def _drawings(options: argparse.Namespace) -> int:
    named = [arm.partition("=") for arm in options.arm]
    bad = [name for name, _, folder in named if not name or not folder]
    if bad or not named or len({name for name, _, _ in named}) < len(named):
        raise ValueError(
            f"--arm={' --arm='.join(options.arm) or '...'}: give one NAME=FOLDER for each way, "
            "every name once"
        )
    against = options.against or named[0][0]
    if against not in [name for name, _, _ in named]:
        raise ValueError(
            f"--against={against}: no arm is called so; there are "
            f"{', '.join(name for name, _, _ in named)}"
        )
    out = Path(options.out or f"outputs/drawings-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    check_out(out, options.overwrite)
    from launch.bench import machine
    from launch.drawing.run import SETTINGS
    from launch.evaluation import drawings, drawings_view
    from launch.runtime import use_compile_cache

    use_compile_cache()
    drawn_with = {}
    for name, _, folder in named:
        if not (file := Path(folder) / SETTINGS).exists():
            raise FileNotFoundError(f"{folder} holds no drawings of launch.generate: no {SETTINGS}")
        drawn_with[name] = json.loads(file.read_text())
    make_out(out)
    arms = {name: drawings.read(Path(folder)) for name, _, folder in named}
    report = drawings.compare(arms, against)
    about = {
        "benchmark": "drawings",
        "arms_drawn_with": drawn_with,
        "environment": machine.environment("launch.evaluate"),
    }
    drawings_view.show(report)
    print(drawings_view.write(out, about, report))
    return 0


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something already.

    Raises:
      FileExistsError: it is a file, or it holds something and `overwrite` is not given.
    """
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; --out is a folder")
    if held and not overwrite:
        raise FileExistsError(
            f"{out} exists and holds {', '.join(held[:3])}{' ...' * (len(held) > 3)}; choose "
            "another --out, or give --overwrite to replace its results"
        )


def make_out(out: Path) -> None:
    """Make the folder, so that what cannot be written is known before anything is measured.

    Raises:
      OSError: it cannot be made, or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} cannot be written to; choose another --out")


if __name__ == "__main__":
    sys.exit(main())
