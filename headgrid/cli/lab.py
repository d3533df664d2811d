"""The lab's commands: compare layouts, list them, report, describe the machine."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headgrid.cli.show import Device, Json, Out, console_for, print_table, progress_bar
from headgrid.errors import InvalidInput, VerificationFailed
from headgrid.experiment.telemetry import DEFAULT_HZ, check_hz

if TYPE_CHECKING:
    from headgrid.experiment.design import Design
    from headgrid.experiment.plan import Wishes
    from headgrid.experiment.starting import Starter

TelemetryHz = Annotated[
    float, typer.Option(help="Samples a second of clocks, power, load and the like, by a side process; 0: none.")
]
Seq = Annotated[int | None, typer.Option(min=1, help="Prompt tokens of each sequence.")]
DecodeSteps = Annotated[int | None, typer.Option(min=1, help="Tokens to decode in each block.")]
DType = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Blocks = Annotated[int | None, typer.Option(min=1, help="Measured blocks in each launch.")]
Text = Annotated[str, typer.Option(help="Input text: a file, or Python's own documentation.")]
OWN_TEXT = "pydoc_data.topics"
LARGEST_BATCH = 65_536  # predictions walk through the micro-batches: a batch beyond reason would take minutes


def compare(
    model: Annotated[
        str | None,
        typer.Option(help="A named model (seed, seed-small, tiny and others), or a folder in Hugging Face format."),
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Layouts, comma-separated; the first is the baseline.")] = None,
    ranks: Annotated[int | None, typer.Option(min=2, help="Ranks: 16 on a CPU, all GPUs otherwise.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=LARGEST_BATCH, help="Sequences.")] = None,
    seq: Seq = None,
    decode_steps: DecodeSteps = None,
    chunk_positions: Annotated[
        int, typer.Option(min=0, help="Chunked prefill: at most so many positions of a prompt a call; 0 for all.")
    ] = 0,
    dtype: DType = None,
    blocks: Blocks = None,
    launches: Annotated[
        int | None, typer.Option(min=1, help="Fresh launches: 5 or more give an interval over launches.")
    ] = None,
    block_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="An arm's turns in a block last so long at least, by a pilot: 0.25 on a CPU, 0.5 on GPUs. 0: no pilot,"
            " one turn, and no block is run again.",
        ),
    ] = None,
    protocol: Annotated[str, typer.Option(help="`default`, or `seed` for 100 + 1000 iterations.")] = "default",
    text: Text = OWN_TEXT,
    device: Device = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `headgrid calibrate`: figures as shares of what was measured there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes weights, block order and which sequences are verified.")] = 0,
    telemetry_hz: TelemetryHz = DEFAULT_HZ,
    breakdown: Annotated[
        bool,
        typer.Option(
            "--breakdown/--no-breakdown",
            help="Behind the timed blocks, watch where each arm's step spends its time, and write traces.",
        ),
    ] = True,
    out: Out = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with a run folder. Of other options only --telemetry-hz, --breakdown and, under torchrun,"
            " --device count."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare layouts of a transformer: verify each, then time them in interleaved random blocks, and report.

    Examples:

        headgrid compare

        headgrid compare --ranks 4 --arms tp2pp2,n2m2:batch,n2m2:sequence+sharded,dp4 --blocks 20

        headgrid compare --model my-llama --ranks 4 --arms tp4,n2m2:batch

        headgrid compare --calibration runs/calibration-20261122-125500.json

        headgrid compare --resume runs/20261122-130000-compare-seed-small
    """
    from headgrid.experiment.plan import Wishes

    wishes = Wishes(
        calibration=calibration,
        model=model,
        arms=_names(arms),
        ranks=ranks,
        batch=batch,
        seq=seq,
        decode_steps=decode_steps,
        chunk_positions=chunk_positions,
        dtype=dtype,
        blocks=blocks,
        launches=launches,
        block_s=block_seconds,
        protocol=protocol,
        text=text,
        device=device,
        seed=seed,
    )
    check_hz(telemetry_hz)
    _compare(wishes, telemetry_hz, breakdown, resume, out, as_json)


def _compare(
    wishes: "Wishes", telemetry_hz: float, breakdown: bool, resume: Path | None, out: Path, as_json: bool
) -> None:
    """Carry out a new comparison under `out`, or the rest of the one in `resume`, and tell what came out."""
    from headgrid.experiment import across, machine, plan, runner
    from headgrid.experiment.starting import HERE
    from headgrid.report.conclude import conclude
    from headgrid.runtime import launch

    console = console_for(as_json)
    joined = launch.joined_by_torchrun()
    if resume is not None:
        planned, backend = resume, machine.backend(wishes.device)
    else:
        started = launch.torchrun_rank()[1] if joined else None
        planned, notes = plan.make(dataclasses.replace(wishes, started_ranks=started))
        for note in notes if not joined or launch.torchrun_rank()[0] == 0 else ():
            console.print(escape(note), style="yellow")
        backend = planned.backend

    def carry_out(starter: "Starter") -> Path:
        run = _run_folder(planned, out, starter)
        with progress_bar(console) as show:
            runner.carry_out(run, show, telemetry_hz, breakdown=breakdown, starter=starter)
        return run

    run = across.directed(backend, carry_out) if joined else carry_out(HERE)
    if run is None:
        return
    summary = conclude(run)
    _print_summary(console, summary)
    console.print(f"report: {run / 'report.html'}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
    _raise_if_failed(summary)


def _run_folder(planned: "Design | Path", out: Path, starter: "Starter") -> Path:
    """A new one of a design, or the one that is gone on with; raises what the hosts refuse of it."""
    from headgrid.experiment import folder

    if isinstance(planned, Path):
        starter.check([folder.open_run(planned)[0]])
        return planned
    starter.check([planned])
    return folder.create(planned, starter.environment(), out)


def _names(arms: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in arms.split(",") if name.strip()) if arms is not None else None


def _raise_if_failed(summary: dict[str, Any]) -> None:
    failed = [arm["label"] for arm in summary["arms"] if not arm["verified"]]
    if failed or not summary["negative_control_rejected"]:
        raise VerificationFailed(
            f"not verified: {', '.join(failed) or 'the negative control was not rejected'}",
            why="; ".join(
                sorted({arm["verify"]["reason"] for arm in summary["arms"] if (arm["verify"] or {}).get("reason")})
            ),
        )


def _interval(figure: dict[str, Any] | None, scale: float, digits: int) -> str:
    if figure is None:
        return "not measured"
    text = f"{figure['mean'] * scale:,.{digits}f}"
    low, high = (x * scale for x in figure["ci95"]) if figure["ci95"] else (None, None)
    return f"{text} [{low:,.{digits}f}, {high:,.{digits}f}]" if low is not None else text


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    from headgrid.report.naming import names
    from headgrid.report.resolving import contestants, planted_line, verdict

    called = names(summary, "\n")
    rows = [
        (
            called[arm["label"]],
            "yes" if arm["verified"] else "NO",
            f"{arm['relative_error']:.2g}" if arm["relative_error"] is not None else "unknown",
            _interval(arm["prefill_tokens_per_s"], 1, 0),
            _interval(arm["decode_tpot_s"], 1e3, 2),
            f"{arm['memory_bytes']['total'] / 2**20:,.1f}" if arm["memory_bytes"] else "unknown",
        )
        for arm in contestants(summary)["arms"]
    ]
    columns = ("arm", "verified", "rel. error", "prefill tok/s [95 %]", "TPOT ms [95 %]", "MiB per rank")
    print_table(console, f"{summary['device']}: arms", columns, rows)
    _print_shares(console, summary)
    baseline = next(arm["label"] for arm in summary["arms"] if arm["role"] == "baseline")
    pairs = [
        (called[row["a"]], row["phase"], _ratio(row), verdict(row), row["unit"] or "")
        for row in summary["comparisons"]
        if row["b"] == baseline
    ]
    columns = ("arm", "phase", "throughput ratio [95 %]", "verdict", "interval over")
    print_table(console, f"against {baseline}", columns, pairs)
    if summary.get("resolution"):
        console.print(planted_line(summary), soft_wrap=True)
    for warning in summary["warnings"]:
        console.print(f"- {escape(warning)}", style="yellow")


def _print_shares(console: Console, summary: dict[str, Any]) -> None:
    from headgrid.report import ceilings

    if found := ceilings.table(summary):
        print_table(console, found.title, found.head, [[cell.text for cell in row] for row in found.rows])


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "not measured"
    low, high = row["ci95"] or (None, None)
    return f"{row['ratio']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def layouts(
    model: Annotated[str, typer.Option(help="A named model, or a folder in Hugging Face format.")] = "seed",
    ranks: Annotated[int | None, typer.Option(min=1, help="Devices: those of --layout, or 16.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_BATCH, help="Sequences.")] = 128,
    seq: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 10_000,
    decode_steps: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    layout: Annotated[str | None, typer.Option(help="Only this layout: is it legal, and what does it need?")] = None,
    draw: Annotated[Path | None, typer.Option(help="With --layout: draw the partition into this SVG file.")] = None,
    as_json: Json = False,
) -> None:
    """List the legal layouts of a model on a number of devices, with the memory each needs on its fullest rank.

    What a single layout stores more than once is said under it. Data-parallel attention (tp4:dp-attention), a baseline
    that stores its attention weights on every rank, is not in the list.

    Examples:

        headgrid layouts --model seed-kv8 --ranks 16

        headgrid layouts --model seed --ranks 12 --layout tp12

        headgrid layouts --model seed --layout n4m4:batch --draw partition.svg
    """
    from headgrid.experiment.budget import worst
    from headgrid.layout.layout import parse_layout
    from headgrid.layout.legal import check, is_legal, legal_layouts
    from headgrid.models.pretrained import find_spec
    from headgrid.report.partition import caption
    from headgrid.spec.workload import Workload

    spec, _ = find_spec(model)
    if decode_steps >= spec.max_positions:
        raise InvalidInput(f"{decode_steps} decode steps, but {model} has {spec.max_positions} positions")
    sizes: dict[str, Any] = {"batch": batch, "seq": min(seq, spec.max_positions - decode_steps)}
    workload = Workload(**sizes, decode_steps=decode_steps, dtype=dtype)  # pyright: ignore[reportArgumentType]
    only = parse_layout(layout) if layout is not None else None
    ranks = ranks or (only.ranks if only else 16)
    if only is not None:
        check(spec, only, workload, ranks)
    if draw is not None:
        _draw(spec, layout, draw)
    chosen = [only] if only else [x for x in legal_layouts(spec, ranks) if x.dp <= batch]
    if only is None and not any(str(x) == f"tp{ranks}" for x in chosen) and is_legal(spec, parse_layout(f"tp{ranks}")):
        chosen.append(parse_layout(f"tp{ranks}"))
    rows = [(str(x), worst(spec, x, workload)) for x in chosen]
    console = console_for(as_json)
    if not rows:
        raise InvalidInput(f"no layout of {model} uses {ranks} ranks with {batch} sequences")
    title = f"{model}: {spec.num_heads} heads, {spec.num_kv_heads} KV heads x {spec.head_dim}; {ranks} ranks; "
    title += f"batch {batch} x {workload.seq} + {decode_steps}, {dtype}; GiB on the fullest rank"
    gib = [
        (
            name,
            *(
                f"{x / 2**30:,.3f}"
                for x in (m.parameters_bytes, m.kv_cache_bytes, m.activations_peak_bytes, m.total_bytes)
            ),
        )
        for name, m in rows
    ]
    print_table(console, title, ("layout", "parameters", "KV cache", "activations", "total"), gib)
    if only is not None:
        console.print(caption(spec, only))
    if as_json:
        keys = (
            "parameters_bytes",
            "kv_cache_bytes",
            "activations_peak_bytes",
            "communication_buffer_bytes",
            "total_bytes",
        )
        listed = [{"layout": name} | {key: getattr(m, key) for key in keys} for name, m in rows]
        sys.stdout.write(json.dumps({"model": model, "ranks": ranks, "layouts": listed}) + "\n")


def _draw(spec: Any, layout: str | None, path: Path) -> None:
    from headgrid.layout.layout import parse_layout
    from headgrid.report import partition, svg

    if layout is None:
        raise InvalidInput("--draw needs the layout to draw", legal=("--layout n4m4:batch",))
    picture = svg.standalone(partition.draw("partition", spec, parse_layout(layout)))
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}", why=str(error)) from error


def report(
    run: Annotated[Path | None, typer.Argument(help="A run folder; the newest under --out by default.")] = None,
    out: Out = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make summary and report of a run again from its journal.

    Example: headgrid report runs/20261122-130000-compare-seed-small
    """
    from headgrid.experiment.folder import runs
    from headgrid.report.conclude import conclude

    folder = run or next(reversed(list(runs(out))), None)
    if folder is None:
        raise InvalidInput(f"no run folder under {out}", command="headgrid compare")
    summary = conclude(folder)
    console = console_for(as_json)
    _print_summary(console, summary)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")


def env(as_json: Json = False) -> None:
    """Show what a run would record of this machine. Example: headgrid env --json"""
    from headgrid.experiment.machine import environment

    found = environment()
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    console = Console(highlight=False)
    for key, value in found.items():
        console.print(f"{key}: {escape(json.dumps(value))}", soft_wrap=True)
