"""The command `headgrid scale`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headgrid.cli.lab import LARGEST_BATCH, OWN_TEXT, Blocks, DecodeSteps, DType, Seq, TelemetryHz, Text
from headgrid.cli.show import Device, Json, Out, console_for, print_table, progress_bar
from headgrid.errors import InvalidInput, VerificationFailed
from headgrid.experiment.telemetry import DEFAULT_HZ, check_hz

if TYPE_CHECKING:
    from headgrid.experiment.design import Design
    from headgrid.experiment.plan import Wishes
    from headgrid.experiment.scale import Study
    from headgrid.experiment.starting import Starter


def scale(
    layouts: Annotated[
        str | None,
        typer.Option(help="Families of layouts, comma-separated: the axis without a number grows with the ranks."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Numbers of ranks: 1,2,4,8 as far as there are GPUs, 1,2,4 on a CPU.")
    ] = None,
    mode: Annotated[str, typer.Option(help="strong, weak, or both.")] = "both",
    model: Annotated[str | None, typer.Option(help="A named model, or a folder in Hugging Face format.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_BATCH, help="Sequences on the fewest ranks; weak multiplies them.")
    ] = None,
    seq: Seq = None,
    decode_steps: DecodeSteps = None,
    dtype: DType = None,
    blocks: Blocks = None,
    rounds: Annotated[int, typer.Option(min=1, help="Launches of every point; 5 give an interval over launches.")] = 5,
    text: Text = OWN_TEXT,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Fixes weights, orders and which sequences are verified.")] = 0,
    telemetry_hz: TelemetryHz = DEFAULT_HZ,
    out: Out = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a study; options but --telemetry-hz, under torchrun --device, are ignored."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Strong and weak scaling of layouts over the ranks that there are, in prefill and decode, with intervals.

    Strong scaling keeps the batch, weak scaling the batch of each rank. Every number of ranks is a run like that of
    `headgrid compare` (verified, with an A/A twin), and the runs are launched in turns.

    Examples:

        headgrid scale

        headgrid scale --layouts tp,dp,n1m:batch,n1m:batch+gathered --ranks 1,2,4,8

        headgrid scale --layouts tppp2,n2m:batch --ranks 2,4,8 --mode strong --rounds 10

        headgrid scale --resume runs/20261122-130000-scale-seed-small
    """
    from headgrid.experiment import across, machine
    from headgrid.experiment.plan import Wishes
    from headgrid.experiment.starting import HERE
    from headgrid.runtime import launch

    joined = launch.joined_by_torchrun()
    wishes = Wishes(
        model=model,
        batch=batch,
        seq=seq,
        decode_steps=decode_steps,
        dtype=dtype,
        blocks=blocks,
        launches=rounds,
        text=text,
        device=device,
        seed=seed,
        started_ranks=launch.torchrun_rank()[1] if joined else None,
    )
    check_hz(telemetry_hz)
    console = console_for(as_json)
    planned = resume or _new(console, wishes, layouts, ranks, mode)

    def carry_out(starter: "Starter") -> dict[str, Any]:
        return _carry_out(console, _study_folder(planned, out, starter), telemetry_hz, starter)

    backend = machine.backend(device) if isinstance(planned, Path) else planned[1][0].backend
    summary = across.directed(backend, carry_out) if joined else carry_out(HERE)
    if summary is None:
        return
    if as_json:
        sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    failed = sorted({row["layout"] for row in summary["rows"] if not row["verified"]})
    if failed or not summary["negative_control_rejected"]:
        raise VerificationFailed(f"not verified: {', '.join(failed) or 'the negative control was not rejected'}")


def _new(
    console: Console, wishes: "Wishes", layouts: str | None, ranks: str | None, mode: str
) -> tuple["Study", list["Design"]]:
    """Plan the study, and say what was decided."""
    from headgrid.experiment import scale
    from headgrid.runtime import launch

    modes = {"both": scale.MODES, "strong": ("strong",), "weak": ("weak",)}.get(mode)
    if modes is None:
        raise InvalidInput(f"mode {mode!r} is not known", legal=("both", "strong", "weak"))
    families = scale.DEFAULT_FAMILIES if layouts is None else _split(layouts)
    study, designs, notes = scale.make(wishes, _numbers(ranks), families, modes)
    for note in notes if not launch.joined_by_torchrun() or launch.torchrun_rank()[0] == 0 else ():
        console.print(escape(note), style="yellow")
    return study, designs


def _study_folder(planned: "Path | tuple[Study, list[Design]]", out: Path, starter: "Starter") -> Path:
    """A new one, or the one that is gone on with; raises what the hosts refuse of it."""
    from headgrid.experiment import scale

    if isinstance(planned, Path):
        starter.check([design for design, _ in scale.open_study(planned)[1]])
        return planned
    starter.check(planned[1])
    return scale.create(*planned, starter.environment(), out)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in _split(text)):
        raise InvalidInput(f"--ranks {text} is not a list of numbers", legal=("--ranks 1,2,4",))
    return tuple(map(int, _split(text)))


def _carry_out(console: Console, path: Path, telemetry_hz: float, starter: "Starter") -> dict[str, Any]:
    """Run what is not there yet, and tell what came out; after Ctrl-C, what there is."""
    from headgrid.experiment import scale

    try:
        with progress_bar(console) as show:
            scale.carry_out(path, show, telemetry_hz, starter)
    finally:
        summary = _conclude(path)
        _print(console, summary)
        console.print(f"study: {path}", soft_wrap=True)
    return summary


def _conclude(path: Path) -> dict[str, Any]:
    """Write the study's summary.json and return it."""
    from headgrid.experiment import scale
    from headgrid.experiment.folder import write_json
    from headgrid.experiment.scale_stats import summarise_study

    summary = summarise_study(*scale.open_study(path)) | {"run": str(path)}
    write_json(path / "summary.json", summary)
    return summary


def _print(console: Console, summary: dict[str, Any]) -> None:
    for mode in dict.fromkeys(row["mode"] for row in summary["rows"]):
        rows = [_row(row) for row in summary["rows"] if row["mode"] == mode]
        columns = ("family", "ranks", "batch", "prefill efficiency", "decode efficiency", "MiB/rank", "B/parameter")
        print_table(console, f"{summary['device']}, {summary['model']}: {mode} scaling, 95 % intervals", columns, rows)
    for warning in summary["warnings"]:
        console.print(f"- {escape(warning)}", style="yellow")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    memory = row["memory"]
    return (
        row["family"],
        str(row["ranks"]),
        str(row["batch"]),
        _efficiency(row, "prefill"),
        _efficiency(row, "decode"),
        f"{memory['fullest_rank']['total_bytes'] / 2**20:,.1f}" if memory else "unknown",
        f"{memory['per_parameter']['parameters_bytes']:.2f}" if memory else "unknown",
    )


def _efficiency(row: dict[str, Any], phase: str) -> str:
    found = row[phase]
    if found["efficiency"] is None:
        return "not measured" if row["verified"] else "NOT VERIFIED"
    low, high = found["efficiency_ci95"] or (None, None)
    return f"{found['efficiency']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
