"""Compare every attention implementation with a float64 reference on the device at hand.

python -m launch.validate_kernels --out=report.json

Forward and backward, over the shapes of the real models, in bfloat16 and float32 (float32 at the
highest matmul precision). The reference covers all tokens of a few random heads.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 when a case fails."""
    parser = argparse.ArgumentParser(prog="python -m launch.validate_kernels", description=__doc__)
    add = parser.add_argument
    add("--out", metavar="FILE.json", help="report")
    add("--shapes", choices=("klein_4b", "klein_9b", "toy", "all"), help="all; on a CPU toy")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    add("--heads", type=int, default=2, help="random key heads to compare per case")
    add("--repeat", type=int, default=10, help="timed calls")
    options = parser.parse_args(argv)

    import jax

    from launch.bench import machine

    shapes = options.shapes or ("toy" if jax.default_backend() == "cpu" else "all")
    report = {
        "environment": machine.environment("launch.validate_kernels"),
        "reference": f"float64 on the host, all tokens of {options.heads} random key heads each",
        "cases": [],
    }
    table = _Table()
    for row in _rows(shapes, options):
        report["cases"].append(row)
        table.add(row)
        _write(options.out, report)  # a run that is cut short keeps what it has
    failed = [row for row in report["cases"] if row["status"] == "fail"]
    table.close(report["environment"], len(failed))
    return 1 if failed else 0


def _write(out: str | None, report: dict[str, Any]) -> None:
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _rows(shapes: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import jax
    import numpy as np

    from clvr_jax.kernels.attention import IMPLEMENTATIONS
    from launch.bench import attention

    rng = np.random.default_rng()
    for case in attention.cases(shapes):
        for dtype in options.dtypes:
            precision = "highest" if dtype == "float32" else "default"
            operands = attention.inputs(case, dtype, seed=int(rng.integers(2**31)))
            heads = rng.permutation(case.kv_heads)[: options.heads].tolist()
            exact = {head: attention.reference(case, operands, head) for head in heads}
            for name in IMPLEMENTATIONS:
                with jax.default_matmul_precision(precision):
                    measured = _measure(case, name, operands, exact, dtype, options.repeat)
                yield {
                    "case": case.name,
                    "shape": case.shape,
                    "dtype": dtype,
                    "matmul_precision": precision,
                    "implementation": name,
                    **measured,
                }


def _measure(case, name: str, operands, exact, dtype: str, repeat: int) -> dict[str, Any]:
    """Errors, speed and verdict of one implementation on one case."""
    import jax

    from launch.bench import attention, timing

    q, k, v, _ = operands
    forward, backward = attention.functions(case, name)
    try:
        jax.eval_shape(forward, q, k, v)
    except (ValueError, NotImplementedError) as error:
        return {"status": "not supported", "why": str(error)}
    try:
        calls = {"fwd": lambda: forward(q, k, v), "fwd_bwd": lambda: backward(*operands)}
        timings, results = timing.measure(calls, repeat)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        # memory is a property of the card, not of the implementation's results
        status = "out of memory" if "RESOURCE_EXHAUSTED" in str(error) else "fail"
        return {"status": status, "why": str(error).strip().splitlines()[0][:300]}
    found = {"out": results["fwd"], **dict(zip(("dq", "dk", "dv"), results["fwd_bwd"]))}
    worst = {part: (0.0, 0.0) for part in found}
    for head, wanted in exact.items():
        for part, pair in attention.errors(case, found, wanted, head).items():
            worst[part] = tuple(map(_larger, worst[part], pair))
    allowed_fwd, allowed_bwd = attention.TOLERANCE[dtype]
    backwards = _larger(*(worst[part][0] for part in ("dq", "dk")), worst["dv"][0])
    good = worst["out"][0] <= allowed_fwd and backwards <= allowed_bwd
    speed = {
        f"{part}_{unit}": round(value, 4)
        for part, factor in (("fwd", 1.0), ("fwd_bwd", 3.5))
        for unit, value in (
            ("ms", 1e3 * timings[part].median),
            ("tflops", factor * case.flop / timings[part].median / 1e12),
        )
    }
    return {
        "status": "pass" if good else "fail",
        "fwd_error": worst["out"][0],
        "bwd_error": backwards,
        "tolerance": [allowed_fwd, allowed_bwd],
        "errors": {part: {"norm": pair[0], "max": pair[1]} for part, pair in worst.items()},
        **speed,
    }


def _larger(*values: float) -> float:
    """The largest value; infinite where one is not a number."""
    return max(float("inf") if value != value else value for value in values)


class _Table:
    """Rows as they come, so that a long run shows its progress."""

    _WIDTHS = (36, 10, 10, 9, 9, 9, 7, 9, 7, 14)
    _NAMES = (
        "case",
        "dtype",
        "impl",
        "fwd err",
        "bwd err",
        "fwd ms",
        "TF/s",
        "+bwd ms",
        "TF/s",
        "",
    )

    def __init__(self):
        from rich.console import Console

        self.console = Console(width=140, highlight=False)
        self._line(self._NAMES, "bold")

    def add(self, row: dict[str, Any]) -> None:
        """Print one row."""
        number = lambda key, text: format(row[key], text) if key in row else ""
        cells = (
            row["case"],
            row["dtype"],
            row["implementation"],
            number("fwd_error", ".1e"),
            number("bwd_error", ".1e"),
            number("fwd_ms", ".3f"),
            number("fwd_tflops", ".4g"),
            number("fwd_bwd_ms", ".3f"),
            number("fwd_bwd_tflops", ".4g"),
            row["status"],
        )
        self._line(cells, {"pass": "", "fail": "bold red"}.get(row["status"], "dim"))

    def close(self, environment: dict[str, Any], failed: int) -> None:
        """Print what ran, and how many failed."""
        versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if "jax" in k)
        where = f"{environment['device']}, driver {environment['driver']}, {versions}"
        self.console.print(f"{where}, cuDNN {environment['cudnn']}: {failed} failed", markup=False)

    def _line(self, cells, style: str) -> None:
        text = " ".join(
            str(cell)[:width].ljust(width) if i < 3 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(cells, self._WIDTHS))
        )
        self.console.print(text, style=style or None, markup=False)


if __name__ == "__main__":
    sys.exit(main())
