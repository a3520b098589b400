"""The command `python -m conversion.lora`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Convert LoRA files of FLUX.2 klein, both ways.

SOURCE is a LoRA safetensors file (diffusers, PEFT, BFL, ai-toolkit, kohya, musubi), a folder that
holds one, adapters saved here, or a training run (or checkpoints/STEP in it) that trained adapters.
WEIGHTS is the model that they belong to.

  python -m conversion.lora style.safetensors adapters/style --weights=weights/klein_4b
  python -m conversion.lora adapters/style style.safetensors --to=peft --weights=klein_4b
  python -m conversion.lora style.safetensors weights/styled --to=merged --weights=weights/klein_4b
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
    found, abstract = _model(arguments.weights, arguments.to)
    adapters = _adapters(arguments.source, abstract)
    adapters = lora.scaled(adapters, arguments.scale)
    ranks = lora.ranks(adapters)
    for path, rank in ranks.items():
        print(f"{path}: rank {rank}")
    print(f"{len(ranks)} adapted kernels, {count(adapters):,} parameters")
    if arguments.to == "adapters":
        from clvr_jax.checkpoint import save

        save(target, adapters)
    elif arguments.to == "merged":
        from conversion.lora.merged import write_merged
        from conversion.progress import Progress

        origin = f"{arguments.source} x {arguments.scale:g}"
        write_merged(target, found, adapters, Progress(), origin)
    else:
        write(target, adapters, abstract, arguments.to, np.dtype(_dtype(arguments.dtype)))
    print(f"wrote {target}")


def _model(weights: str, to: str) -> tuple[Any, Any]:
    """What is at the weights (None for a variant's name), and the transformer's shapes."""
    from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS
    from clvr_jax.models.flux2.transformer import abstract_params
    from conversion.detect import find

    if weights in TRANSFORMER_VARIANTS and not Path(weights).exists():
        if to == "merged":
            raise ValueError(f"--weights={weights} names sizes; merging needs a model's folder")
        return None, abstract_params(TRANSFORMER_VARIANTS[weights])
    found = find(weights, None if to == "merged" else ("transformer",))
    if "transformer" not in found.components:
        raise ValueError(f"{weights} is a {found.kind} without a transformer")
    return found, found.components["transformer"].abstract()


def _adapters(source: Path, abstract: Any) -> Any:
    """Adapters of a LoRA file, saved ones, or those of a training run."""
    from conversion import runs
    from conversion.lora import read

    if at := runs.place(source):
        component = at.record()["component"]
        if component != "transformer":
            raise ValueError(f"{source} trained a {component}; LoRA files are of a transformer")
        return runs.adapters(at)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a LoRA file or saved adapters")
    if source.is_file() or any(source.glob("*.safetensors")):
        return read(source, abstract)
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
        help="adapters for this project (default), a LoRA file for diffusers (peft) or for tools "
        "with BFL's names (bfl), or the model with the adapters merged into it",
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="MODEL",
        help="the model: folder, file or repository id; klein_4b or klein_9b where only sizes are "
        "needed (not for merged)",
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
