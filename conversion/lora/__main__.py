"""The command `python -m conversion.lora`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Convert LoRA files of FLUX.2 klein and Qwen3-VL, both ways.

SOURCE is a LoRA safetensors file (diffusers, PEFT, BFL, ai-toolkit, kohya, musubi), a folder that
holds one, adapters saved here, or a training run (or checkpoints/STEP in it) that trained adapters.
WEIGHTS is the model that they belong to.

  python -m conversion.lora style.safetensors adapters/style --weights=weights/klein_4b
  python -m conversion.lora adapters/style style.safetensors --to=peft --weights=klein_4b
  python -m conversion.lora style.safetensors weights/styled --to=merged --weights=weights/klein_4b
  python -m conversion.lora runs/vlm adapters/vlm --to=peft --weights=Qwen/Qwen3-VL-8B-Instruct

A TARGET of --to=peft that does not end in .safetensors is PEFT's own folder. It names WEIGHTS as
its base, and every command takes it for the adapted model: --weights=adapters/vlm.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 refused or failed (2 is argparse's)."""
    arguments = _parser().parse_args(argv)
    # tensors are moved, hardly computed with: leave the accelerator to others
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        _run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clvr_jax import lora
    from clvr_jax.tree import count
    from conversion.lora import write

    target = arguments.target
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another target")
    found, model = _model(arguments.weights, arguments.to)
    to = "folder" if arguments.to == "peft" and target.suffix != ".safetensors" else arguments.to
    if found is None and to in ("folder", "merged"):
        what = "merging" if to == "merged" else "PEFT's folder, which names its base,"
        raise ValueError(
            f"--weights={arguments.weights} names sizes; {what} needs a model's folder"
        )
    if arguments.base and to != "folder":
        raise ValueError(f"--base={arguments.base} is for PEFT's folder: --to=peft, no ending")
    if model.name == "vlm" and to not in ("adapters", "folder"):
        raise ValueError(
            f"adapters of a Qwen3-VL are written as PEFT's folder: --to=peft and a TARGET without "
            f"ending, given --to={arguments.to} {target}; python -m conversion merges such a folder"
        )
    adapters = lora.scaled(_adapters(arguments.source, model), arguments.scale)
    ranks = lora.ranks(adapters)
    for path, rank in ranks.items():
        print(f"{path}: rank {rank}")
    print(f"{len(ranks)} adapted kernels, {count(adapters):,} parameters")
    dtype = np.dtype(_dtype(arguments.dtype))
    if to == "adapters":
        from clvr_jax.checkpoint import save

        save(target, adapters)
    elif to == "merged":
        from conversion.lora.merged import write_merged
        from conversion.progress import Progress

        origin = f"{arguments.source} x {arguments.scale:g}"
        write_merged(target, found, adapters, Progress(), origin)
    elif to == "folder":
        _write_folder(arguments, adapters, model, dtype)
    else:
        write(target, adapters, model.abstract(), to, dtype)
    print(f"wrote {target}")


def _write_folder(arguments: argparse.Namespace, adapters: Any, model: Any, dtype: Any) -> None:
    """Write PEFT's folder, and how the inputs of a run's adapters are made."""
    import shutil

    from conversion import runs
    from conversion.lora.files import write_folder
    from conversion.output import finish, free, write_conditioning

    partial, table = free(arguments.target), model.table("diffusers")
    partial.mkdir(parents=True)
    try:
        here = Path(arguments.weights)
        base = arguments.base or (str(here.resolve()) if here.exists() else arguments.weights)
        write_folder(partial, adapters, model.abstract(), table, base, dtype)
        if at := runs.place(arguments.source):
            write_conditioning(partial, at.record())
        finish(partial, arguments.target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _model(weights: str, to: str) -> tuple[Any, Any]:
    """What is at the weights, None for a variant's name; and its transformer or Qwen3-VL."""
    from conversion.components import KINDS, Component
    from conversion.detect import ADAPTED, find

    for name in ADAPTED:
        if weights in KINDS[name].variants and not Path(weights).exists():
            config = KINDS[name].variants[weights]
            return None, Component(name, "diffusers", Path(weights), config)
    found = find(weights, None if to == "merged" else ADAPTED)
    for name in ADAPTED:
        if name in found.components:
            return found, found.components[name]
    raise ValueError(f"{weights} is a {found.kind} with neither klein's transformer nor Qwen3-VL")


def _adapters(source: Path, model: Any) -> Any:
    """Adapters of a LoRA file, saved ones, or those of a training run."""
    from conversion import runs
    from conversion.lora import read

    if at := runs.place(source):
        component = at.record()["component"]
        if component != model.name:
            raise ValueError(
                f"{source} trained the {component}, {model.path} has a {model.name}; --weights is "
                "the model that the run began from"
            )
        return runs.adapters(at)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a LoRA file or saved adapters")
    if source.is_file() or any(source.glob("*.safetensors")):
        return read(source, model.abstract(), model.tables)
    from clvr_jax.checkpoint import ParamsReader
    from clvr_jax.tree import unflatten

    saved = ParamsReader(source)
    return unflatten({name: saved.read(name) for name in saved.specs})


def _dtype(name: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if name == "bfloat16" else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.lora",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="LoRA file, saved adapters, or a run"
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="what to create")
    parser.add_argument(
        "--to",
        choices=("adapters", "peft", "bfl", "merged"),
        default="adapters",
        help="adapters for this project (default), a LoRA file for diffusers or a folder for PEFT "
        "(peft), a file for tools with BFL's names (bfl), or klein with the adapters merged",
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="MODEL",
        help="the model: folder, file or repository id; klein_4b, klein_9b or qwen3_vl_8b where "
        "only sizes are needed (not for merged and PEFT's folder)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="what PEFT's folder calls its base (default: WEIGHTS); ./ and ../ are beside it",
    )
    parser.add_argument(
        "--scale", type=_finite, default=1.0, help="multiplies the effect (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        default="float32",
        help="type of a LoRA file that is written (default: float32)",
    )
    return parser


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, given {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
