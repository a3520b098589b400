"""The command line of `python -m conversion`."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_COMPONENTS = ("transformer", "vae", "text_encoder", "vlm")
_DESCRIPTION = """\
Convert checkpoints of FLUX.2 klein, Qwen3 and Qwen3-VL, both ways.

SOURCE is a diffusers folder, a transformers folder, a folder converted here, one component's
folder, a single file in BFL's layout (ComfyUI's too), or a repository id on the Hugging Face hub.

  python -m conversion black-forest-labs/FLUX.2-klein-4B weights/klein_4b
  python -m conversion flux-2-klein-4b.safetensors weights/mine --base=weights/klein_4b
  python -m conversion weights/klein_4b exported --to=diffusers
  python -m conversion weights/klein_4b exported.safetensors --to=bfl --components=transformer
  python -m conversion Qwen/Qwen3-VL-8B-Instruct weights/qwen3_vl_8b
  python -m conversion weights/qwen3_vl_8b exported --to=transformers
  python -m conversion inspect SOURCE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 refused or failed (2 is argparse's)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    inspecting = argv[:1] == ["inspect"]
    arguments = _parser(inspecting).parse_args(argv[1:] if inspecting else argv)
    # tensors are moved, not computed with: leave the accelerator to others
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from clvr_jax.weights import WeightsError
    from conversion.convert import ConversionError

    try:
        return _inspect(arguments) if inspecting else _convert(arguments)
    except ConversionError as error:
        from conversion import report

        print(report.table(error.reports))
        print(f"error: {error}", file=sys.stderr)
    except (WeightsError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
    return 1


def _convert(arguments: argparse.Namespace) -> int:
    from conversion import report
    from conversion.convert import Options, convert
    from conversion.progress import Progress

    options = Options(**vars(arguments))
    reports = convert(options, Progress())
    print(report.table(reports))
    print(f"wrote {options.target}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from conversion import report
    from conversion.convert import Options, inspect

    found, reports, prints = inspect(Options(**vars(arguments), target=Path()))
    print(f"{found.path}: {found.kind}")
    for name, component in found.components.items():
        print(f"{name}: {component.variant}, {component.config}")
        print(f"{name}: fingerprint {prints.get(name, '-')}")
    print(f"also: {', '.join(found.shared) or 'nothing else'}")
    print(report.table(reports))
    return 0 if all(r.check.ok for r in reports) else 1


def _parser(inspecting: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion" + (" inspect" if inspecting else ""),
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, file or repository id")
    if not inspecting:
        parser.add_argument("target", metavar="TARGET", type=Path, help="what to create")
        parser.add_argument(
            "--to",
            choices=("orbax", "diffusers", "transformers", "bfl"),
            help="layout to write; folders of diffusers and of transformers are alike, the latter "
            "hold text_encoder and vlm (default: orbax; diffusers if SOURCE was converted here)",
        )
        parser.add_argument(
            "--dtype",
            choices=("bfloat16", "float32", "float16"),
            help="type to write (default: each tensor's own)",
        )
        parser.add_argument(
            "--max_shard_gb",
            type=_positive,
            default=5.0,
            metavar="GB",
            help="size of safetensors files in a folder (default: 5)",
        )
    parser.add_argument(
        "--components",
        type=_components,
        metavar="NAME,...",
        help=f"of {','.join(_COMPONENTS)} (default: all that are found)",
    )
    parser.add_argument(
        "--allow_unexpected",
        type=_regex,
        default="",
        metavar="REGEX",
        help="tensors that may be left behind (re.search)",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="folder or repository with what single files lack (configs, tokenizer, other parts)",
    )
    return parser


def _components(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in _COMPONENTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown {', '.join(unknown)}; choose from {', '.join(_COMPONENTS)}"
        )
    return names


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, given {text}")
    return value
