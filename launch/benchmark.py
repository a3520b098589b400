"""Time the models at real shapes with random weights.

python -m launch.benchmark image --model=klein_4b
python -m launch.benchmark text --model=qwen3_vl_8b
python -m launch.benchmark loop --model=klein_9b --vlm=qwen3_vl_8b
python -m launch.benchmark train_image --model=klein_4b --lora=64 --features=precomputed
python -m launch.benchmark train_vlm --model=qwen3_vl_8b --lora=64 --dry_run=h200x1
"""

import argparse
import os
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    _image_options(subjects.add_parser("image", help="prompt and references to pixels"))
    _text_options(subjects.add_parser("text", help="a vision-language model: look, read, write"))
    _loop_options(subjects.add_parser("loop", help="both models: whole trajectories"))
    _train_image_options(subjects.add_parser("train_image", help="steps of the image stage"))
    _train_vlm_options(subjects.add_parser("train_vlm", help="steps of the VLM stage"))
    options = parser.parse_args(argv)
    from launch.runtime import readable_errors

    if options.threads:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if getattr(options, "peer", None):  # two frameworks share the memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run = {"image": _image, "text": _text, "loop": _loop}.get(options.subject, _train)
    with readable_errors():
        return run(options)


def _image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="klein_4b", choices=("klein_4b", "klein_9b", "mid", "toy"))
    add("--size", type=_size, metavar="HxW", help="pixels; 1024x1024, mid and toy 256x256")
    add("--steps", type=int, default=4)
    add("--guidance", type=float, default=1.0, help="1 is none; anything else doubles the batch")
    add("--references", type=int, default=0, choices=range(4), help="of the size of the picture")
    add("--batch", type=int, default=1)
    add("--text_tokens", type=int, default=512, help="text length, padding included")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--pattern", default="full", choices=("full", "kv", "causal"))
    add("--layers", default="scan", choices=("scan", "unrolled"))
    add("--peer", choices=("diffusers",), help="measure the PyTorch pipeline in turns with ours")
    add(
        "--peer_compile",
        default="default",
        choices=("none", "default", "max-autotune-no-cudagraphs"),
        help="torch.compile mode of a second peer; none: eager only",
    )
    add("--peer_budget", type=float, default=180, help="seconds that torch.compile may take")
    add("--startup", action="store_true", help="also time fresh processes to their first picture")
    add("--check_hlo", action="store_true", help="report weights that the layer loop copies")
    add("--threads", type=int, help="CPU cores for both sides (default: all that are allowed)")
    add("--repeat", type=int, default=10, help="timed calls of every part")
    add("--out", metavar="FILE.json", help="result file")


def _text_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = ("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "mid", "toy")
    add("--model", default="qwen3_vl_8b", choices=models)
    add("--prompt", type=int, help="tokens read before decoding; 2000, mid and toy 256")
    add("--turn", type=int, default=256, help="tokens of the second turn")
    add("--picture", type=int, help="edge in pixels; 1024, mid and toy 256")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded together")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--peer", choices=("transformers",), help="measure it in turns with ours")
    add("--threads", type=int, help="CPU cores for both sides (default: all that are allowed)")
    add("--repeat", type=int, default=10, help="timed calls of every part")
    add("--out", metavar="FILE.json", help="result file")


def _loop_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="klein_9b", choices=("klein_4b", "klein_9b", "mid", "toy"))
    models = ("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "mid", "toy")
    add("--vlm", default="qwen3_vl_8b", choices=models)
    add("--size", type=_size, metavar="HxW", help="pixels; 1024x1024, mid and toy 256x256")
    add("--steps", type=int, default=4)
    add("--guidance", type=float, default=1.0, help="1 is none; anything else doubles the batch")
    add("--text_tokens", type=int, default=512, help="klein's text length, padding included")
    add("--generations", type=int, nargs="+", default=[1, 2, 6], help="pictures of a trajectory")
    add("--tokens", type=int, default=300, help="that a turn writes")
    add("--verdict", type=int, default=100, help="tokens of the last turn")
    add("--references", default="last", choices=("last", "all"), help="that an edit is given")
    add("--free", action="store_true", help="turns without the loop's grammar, in chunks")
    add("--together", type=int, default=1, help="trajectories at the same time")
    add("--pattern", default="full", choices=("full", "kv"))
    add("--layers", default="scan", choices=("scan", "unrolled"))
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--threads", type=int, help="CPU cores (default: all that are allowed)")
    add("--repeat", type=int, default=5, help="timed trajectories of each length")
    add("--out", metavar="FILE.json", help="result file")


def _train_image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="klein_4b", choices=("klein_4b", "klein_9b", "mid", "toy"))
    add("--size", type=_size, metavar="HxW", help="pixels; 1024x1024, mid 256x256, toy 64x64")
    add("--references", type=int, default=0, choices=range(9), help="of the size of the picture")
    add("--text_tokens", type=int, default=512, help="text length, padding included")
    add(
        "--features",
        choices=("fly", "precomputed"),
        help="text features and latents; made on the fly, unless beside a peer, which has no "
        "encoders",
    )
    _train_options(parser, "diffusers")


def _train_vlm_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = ("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "mid", "toy")
    add("--model", default="qwen3_vl_8b", choices=models)
    add("--tokens", type=int, help="of a row, pictures included; 4096, mid 1024, toy 128")
    add("--images", type=int, default=1, choices=(0, 1, 2, 4, 8, 16), help="pictures of a row")
    add("--picture", type=int, help="edge in pixels; 1024, mid 256, toy 64")
    add("--train", default=".*", help="pattern of what is trained; ^language/ freezes the tower")
    _train_options(parser, "transformers")


def _train_options(parser: argparse.ArgumentParser, peer: str) -> None:
    add = parser.add_argument
    add("--lora", type=int, default=0, metavar="RANK", help="of adapters; 0: full fine-tuning")
    add("--rows", type=int, default=1, help="of a micro-batch, per device along data and fsdp")
    add("--accumulation", type=int, default=1, help="micro-batches of a step")
    add("--precision", default="mixed", choices=("float32", "mixed", "bfloat16"))
    add("--moments", default="float32", choices=("float32", "bfloat16"), help="AdamW's")
    add("--remat", default="full", choices=("none", "full", "attention", "dots"))
    add("--mesh", type=_mesh, default="fsdp=-1", metavar="AXIS=SIZE,...", help="several devices")
    add("--peer", choices=(peer,), help="measure it in turns with ours, on one device")
    add(
        "--apart",
        action="store_true",
        help="the peer after us instead, each with all of the memory",
    )
    add("--threads", type=int, help="CPU cores for both sides (default: all that are allowed)")
    add("--repeat", type=int, default=10, help="timed steps")
    add(
        "--loop_steps",
        type=int,
        default=10,
        help="steps alone and in the training loop, three times each, to see what the loop adds",
    )
    add("--dry_run", metavar="TARGET", help="trace for h200x1, v5e-8, ...; nothing is run")
    add("--out", metavar="FILE.json", help="result file")


def _mesh(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {axis: int(size) for axis, size in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=SIZE,..., e.g. fsdp=4") from None


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, e.g. 1024x768") from None
    return height, width


def _image_case(options: argparse.Namespace, rounding: str = "none", **shapes: int) -> Any:
    """What is measured of klein, as the options of two subjects have it."""
    from clvr_jax.generate.image import Settings
    from launch.bench import image

    height, width = options.size or ((256,) * 2 if options.model in ("mid", "toy") else (1024,) * 2)
    settings = Settings(
        height=height,
        width=width,
        steps=options.steps,
        guidance=options.guidance,
        text_tokens=options.text_tokens,
        pattern=options.pattern,
        rounding=rounding,
    )
    scan = options.layers == "scan"
    return image.Case(options.model, settings, dtype=options.dtype, scan=scan, **shapes)


def _image(options: argparse.Namespace) -> int:
    from launch.bench import image, machine, startup, table

    # what the peer does to t, so that the pictures can be compared
    rounding = "diffusers" if options.peer and options.dtype == "bfloat16" else "none"
    case = _image_case(options, rounding, references=options.references, batch=options.batch)
    # before this process takes the device: a fresh one needs it
    started = {"startup": startup.measure(case)} if options.startup else {}
    environment = machine.environment("launch.benchmark")
    peer = options.peer_compile if options.peer else None
    measured = image.run(case, options.repeat, peer, options.peer_budget, options.check_hlo)
    report = {"environment": environment, **measured, **started}
    table.show(report)
    _write(options.out, report)
    return 0


def _text(options: argparse.Namespace) -> int:
    from launch.bench import machine, text

    small = options.model in ("toy", "mid")
    case = text.Case(
        model=options.model,
        prompt=options.prompt or (256 if small else 2000),
        turn=options.turn,
        picture=options.picture or (256 if small else 1024),
        batches=tuple(options.batch),
        dtype=options.dtype,
    )
    environment = machine.environment("launch.benchmark")
    measured = text.run(case, options.repeat, options.peer is not None, options.threads)
    report = {"environment": environment, **measured}
    text.show(report)
    _write(options.out, report)
    return 0


def _loop(options: argparse.Namespace) -> int:
    from clvr_jax.closed_loop.budget import MOST_GENERATIONS
    from launch.bench import loop, machine

    wrong = [n for n in options.generations if not 1 <= n <= MOST_GENERATIONS]
    least = min(options.together, options.repeat, options.tokens, options.verdict)
    if wrong or least < 1:
        raise ValueError(
            f"generations {options.generations}: expected 1 to {MOST_GENERATIONS}; tokens, "
            "verdict, together and repeat are 1 at least"
        )
    images = _image_case(options)
    height, width = images.settings.height, images.settings.width
    if height % 32 or width % 32 or height * width > 1024**2:
        raise ValueError(
            f"size {height}x{width}: give multiples of 32 and at most 1024x1024 pixels, which "
            "neither model resizes"
        )
    case = loop.Case(
        images=images,
        vlm=options.vlm,
        generations=tuple(options.generations),
        tokens=options.tokens,
        verdict=options.verdict,
        references=options.references,
        grammar=not options.free,
        together=options.together,
    )
    environment = machine.environment("launch.benchmark")
    report = {"environment": environment, **loop.run(case, options.repeat)}
    loop.show(report)
    _write(options.out, report)
    return 0


def _train(options: argparse.Namespace) -> int:
    from launch.bench import machine, train, train_table
    from launch.bench.train_jobs import FLY, PRECOMPUTED, Case

    scale = {"toy": 0, "mid": 1}.get(options.model, 2)
    fields = {
        name: getattr(options, name)
        for name in ("model", "lora", "rows", "accumulation", "precision", "moments", "remat")
    }
    if options.subject == "train_image":
        fields |= {
            "subject": "image",
            "size": options.size or ((64,) * 2, (256,) * 2, (1024,) * 2)[scale],
            "references": options.references,
            "text_tokens": options.text_tokens,
            "features": options.features or (PRECOMPUTED if options.peer else FLY),
        }
    else:
        fields |= {
            "subject": "vlm",
            "tokens": options.tokens or (128, 1024, 4096)[scale],
            "pictures": options.images,
            "picture": options.picture or (64, 256, 1024)[scale],
            "train": options.train,
        }
    case = Case(mesh=options.mesh, **fields)
    if options.dry_run:
        plan = train.trace(case, options.dry_run)
        train_table.show_plan(plan)
        _write(options.out, plan)
        return 0
    environment = machine.environment("launch.benchmark")
    measured = train.run(
        case, options.repeat, options.loop_steps, options.peer is not None, options.apart
    )
    report = {"environment": environment, **measured}
    train_table.show(report)
    _write(options.out, report)
    return 0


def _write(out: str | None, report: dict) -> None:
    if not out:
        return
    import json
    from pathlib import Path

    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
