"""The command `headgrid calibrate`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headgrid.cli.show import Device, Json, console_for, print_table, progress_bar

if TYPE_CHECKING:
    from headgrid.experiment.calibrate import Plan
    from headgrid.spec.calibration import Calibration, Cost, Measured


def calibrate(
    device: Device = None,
    ranks: Annotated[int | None, typer.Option(min=1, max=1024, help="Ranks: all GPUs, or 2 on a CPU.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For which each rate is sustained: 3 on a GPU, 1 on a CPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; runs/calibration-TIME.json by default.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what this machine reaches: products, attention, memory, launches, and every collective over its sizes.

    All ranks work at the same time, and each rate is that of the windows at the end, when clocks have settled. With
    `headgrid compare --calibration FILE` a run then gives its figures as shares of these ceilings. docs/calibrate.md
    says how each figure is measured.

    Examples:

        headgrid calibrate

        headgrid calibrate --seconds 10 --out h200.json

        headgrid calibrate --device cpu --ranks 4 --json
    """
    from headgrid.experiment import calibrate
    from headgrid.runtime import launch

    console = console_for(as_json)
    joined = launch.joined_by_torchrun()
    plan, notes = calibrate.make(device, ranks, seconds, out, launch.torchrun_rank()[1] if joined else None)
    for note in notes if not joined or launch.torchrun_rank()[0] == 0 else ():
        console.print(escape(note), style="yellow")
    found = calibrate.carry_out_joined(plan) if joined else _on_this_host(console, plan)
    if found is None:
        return
    _print(console, found)
    console.print(f"calibration: {plan.out}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict() | {"file": str(plan.out)}, allow_nan=False) + "\n")


def _on_this_host(console: Console, plan: "Plan") -> "Calibration":
    from headgrid.experiment import calibrate

    with progress_bar(console) as show:
        return calibrate.carry_out(plan, show)


def _print(console: Console, found: "Calibration") -> None:
    kernels = [("product", kernel) for kernel in found.products] + [("attention", kernel) for kernel in found.attention]
    unit = (1e12, "TFLOP/s") if found.device == "cuda" else (1e9, "GFLOP/s")
    rows = [
        _row(f"{name}, {kernel.dtype}, {' x '.join(map(str, kernel.shape))}", kernel.flop_per_s, *unit)
        for name, kernel in kernels
    ]
    rows.append(_row("memory, copied (read + written)", found.copy_bytes_per_s, 1e9, "GB/s"))
    rows.append(_row("memory, read", found.read_bytes_per_s, 1e9, "GB/s"))
    rows.append(_row("launch of a small kernel", found.launch_s, 1e-6, "us"))
    if found.graph_launch_s is not None:
        rows.append(_row("the same in a CUDA graph", found.graph_launch_s, 1e-6, "us"))
    rows.append(_row("host, empty loop", found.spin_per_s, 1e6, "M turns/s"))
    columns = ("of each device", "median", "unit", "lowest to highest", "best", "n", "settled", "MHz")
    print_table(console, f"{found.ranks} x {found.device_name}, all at the same time", columns, rows)
    if found.collectives:
        columns = ("collective", "ranks", "alpha, us [95 %]", "beta, GB/s [95 %]", "error rms / worst", "best GB/s")
        lines = [_line(cost) for cost in found.collectives]
        print_table(console, "a call's time = alpha + bytes that a rank sends / beta", columns, lines)


def _row(name: str, figure: "Measured", unit: float, called: str) -> tuple[str, ...]:
    median, low, high, best = (
        f"{value / unit:,.4g}" for value in (figure.median, figure.low, figure.high, figure.best)
    )
    clock = f"{min(figure.sm_clock_mhz):.0f}" if figure.sm_clock_mhz else ""
    return name, median, called, f"{low} to {high}", best, str(figure.n), "yes" if figure.settled else "NO", clock


def _line(cost: "Cost") -> tuple[str, ...]:
    beta = f"{cost.beta_bytes_per_s / 1e9:.4g}" if cost.beta_bytes_per_s else "not resolved"
    return (
        cost.kind + ("" if cost.graphed else ", called"),
        str(cost.ranks),
        f"{cost.alpha_s * 1e6:.4g}" + _interval(cost.alpha_ci95, 1e6),
        beta + _interval(cost.beta_ci95, 1e-9),
        f"{cost.rms_relative_error:.1%} / {cost.worst_relative_error:.1%}",
        f"{cost.best_bytes_per_s / 1e9:.4g}",
    )


def _interval(ci95: tuple[float, float] | None, scale: float) -> str:
    return f" [{ci95[0] * scale:.4g}, {ci95[1] * scale:.4g}]" if ci95 else ""
