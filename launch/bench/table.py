"""Result files as readable tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from launch.bench import machine


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print an image report."""
    console = console or Console(width=110)
    env, limit, case = report["environment"], report["limits"], report["case"]
    settings = case["settings"]
    console.print(
        f"{case['model']} {case['dtype']}, {settings['height']}x{settings['width']}, "
        f"{settings['steps']} steps, guidance {settings['guidance']}, "
        f"{case['references']} references ({settings['pattern']}), batch {case['batch']}, "
        f"layers {'scanned' if case['scan'] else 'unrolled'}",
        highlight=False,
    )
    console.print(
        f"{env['device']}, driver {env['driver']}, {machine.versions(env)}", highlight=False
    )
    table = Table(caption=f"limit {limit['limit_tflops']:.3g} TFLOP/s: {limit['limit_is']}")
    table.add_column("part")
    for name in ("compile s", "median ms", "min ms", "TFLOP", "TFLOP/s", "of limit"):
        table.add_column(name, justify="right")
    for name, part in {**report["components"], "end to end": report["end_to_end"]}.items():
        table.add_row(
            name,
            f"{part['compile_s']:.1f}",
            f"{part['median_ms']:.2f}",
            f"{part['min_ms']:.2f}",
            f"{part['flop'] / 1e12:.3g}",
            f"{part['tflops']:.3g}",
            f"{part['share_of_limit']:.1%}",
        )
    console.print(table)
    memory = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in report["memory"].items())
    console.print(
        f"step {report['components']['denoise']['step_ms']:.2f} ms, "
        f"{report['end_to_end']['images_per_s']:.3g} images/s, {memory}; a matmul runs at "
        f"{limit['measured_matmul_tflops']:.4g} TFLOP/s here",
        highlight=False,
    )
    copies = report["components"]["denoise"].get("weight_copies")
    if copies is not None:
        lines = [
            f"{place}: {c['iterations']} x {c['mb_per_iteration']} MB"
            for place, c in copies.items()
        ]
        console.print(f"weights copied: {'; '.join(lines) or 'none'}", highlight=False)
    for label, stages in report.get("startup", {}).items():
        text = ", ".join(f"{k.removesuffix('_s').replace('_', ' ')} {v}" for k, v in stages.items())
        console.print(f"{label.replace('_', ' ')}, seconds since start: {text}", highlight=False)
    for who, values in report.get("peers", {}).items():
        console.print(_peer(who, values), highlight=False)


def _peer(who: str, values: dict[str, Any]) -> str:
    if "error" in values:
        return f"{who}: {values['error']}"
    parts = [
        f"{name} {v['median_ms']:.2f} ms = {v['ratio']:.2f} x ours"
        for name, v in values.items()
        if isinstance(v, dict) and "ratio" in v
    ]
    gap = values["output"]
    text = f"{who}: " + "; ".join(parts)
    return (
        f"{text}\n  pictures differ by {gap['mean_level']:.3g} grey levels on average, "
        f"{gap['largest_level']:.0f} at most"
    )
