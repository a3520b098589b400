"""Training reports as readable tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from launch.bench import machine


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a training report."""
    console = console or Console(width=120)
    env, limit, case = report["environment"], report["limits"], report["case"]
    say = lambda text: console.print(text, highlight=False)
    say(
        f"{title(case)}: {report['parameters']:,} parameters, {report['trained']:,} of them trained"
        if not case["lora"]
        else f"{title(case)}: {report['parameters']:,} parameters and {report['trained']:,} of "
        "adapters"
    )
    say(f"{env['devices']} x {env['device']}, {env['processor']}, {machine.versions(env)}")
    unit = "images" if case["subject"] == "image" else "tokens"
    table = Table(caption=f"MFU of {limit['limit_tflops']:.3g} TFLOP/s: {limit['limit_is']}")
    table.add_column("who")
    for name in ("median s", "min s", f"{unit}/s", "TFLOP/s", "MFU", "x ours"):
        table.add_column(name, justify="right")
    for who, side in {"ours": report["step"], **report.get("peers", {})}.items():
        table.add_row(
            who,
            f"{side['median_s']:.4g}",
            f"{side['min_s']:.4g}",
            f"{side[f'{unit}_per_s']:.4g}",
            f"{side['model_tflops']:.3g}",
            f"{side['mfu']:.1%}",
            f"{side['ratio']:.2f}" if "ratio" in side else "",
        )
    console.print(table)
    step, flop = report["step"], report["flop"]
    say(
        f"traced in {step['trace_s']:.1f} s, compiled in {step['compile_s']:.1f} s; "
        f"{flop['model'] / 1e12:.4g} TFLOP a step, {flop['hardware'] / 1e12:.4g} with what is "
        "computed again"
    )
    say(", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in report["memory"].items()))
    outside = report["outside"]
    if outside:
        say(
            f"outside the step: {outside['share']:.1%} of the loop, {outside['loop_s']:.4g} s a "
            f"step in it and {outside['alone_s']:.4g} s alone; the host is busy for "
            f"{1e3 * outside['host_s']:.2f} ms a step ({outside['host_share']:.1%})"
        )
    for who, values in report["first_step"].items():
        told = ", ".join(f"{k.replace('_', ' ')} {v:.7g}" for k, v in values.items())
        say(f"first step, {who}: {told}")


def show_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print what a traced step would be."""
    console = console or Console(width=120)
    room = "unknown room" if plan["room_gb"] is None else f"{plan['room_gb']} GB of room"
    console.print(
        f"{title(plan['case'])} on {plan['target']}: {plan['parameters']:,} parameters, "
        f"{plan['trained']:,} trained, {plan['flop']['model'] / 1e12:.4g} TFLOP a step; traced in "
        f"{plan['trace_s']} s ({plan['program_mb']} MB); {plan['planned_gb']} GB planned per "
        f"device, {room}",
        highlight=False,
    )


def title(case: dict[str, Any]) -> str:
    """Return a case in one line."""
    method = f"LoRA of rank {case['lora']}" if case["lora"] else "full"
    if case["subject"] == "image":
        height, width = case["size"]
        what = f"{height}x{width}, {case['references']} references, features {case['features']}"
    else:
        what = f"{case['tokens']} tokens, {case['pictures']} pictures of {case['picture']}"
    return (
        f"{case['model']} {method}, {what}, {case['accumulation']} x {case['rows']} rows, "
        f"{case['precision']}, remat {case['remat']}"
    )
