"""Time the models at real shapes with random weights.

python -m launch.benchmark image --model=klein_4b
python -m launch.benchmark text --model=qwen3_vl_8b
"""

import argparse
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    _image_options(subjects.add_parser("image", help="prompt and references to pixels"))
    _text_options(subjects.add_parser("text", help="a vision-language model: look, read, write"))
    options = parser.parse_args(argv)
    from launch.runtime import readable_errors

    if options.threads:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.peer:  # two frameworks share the memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with readable_errors():
        return _image(options) if options.subject == "image" else _text(options)


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


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, e.g. 1024x768") from None
    return height, width


def _image(options: argparse.Namespace) -> int:
    from clvr_jax.generate.image import Settings
    from launch.bench import image, machine, startup, table

    height, width = options.size or ((256,) * 2 if options.model in ("mid", "toy") else (1024,) * 2)
    case = image.Case(
        model=options.model,
        settings=Settings(
            height=height,
            width=width,
            steps=options.steps,
            guidance=options.guidance,
            text_tokens=options.text_tokens,
            pattern=options.pattern,
            # what the peer does to t, so that the pictures can be compared
            rounding="diffusers" if options.peer and options.dtype == "bfloat16" else "none",
        ),
        references=options.references,
        batch=options.batch,
        dtype=options.dtype,
        scan=options.layers == "scan",
    )
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
