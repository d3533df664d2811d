"""`headgrid check`: a run folder or a file of results through every gate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput
from headgrid.experiment.check import (
    breakdown,
    ceilings,
    clocks,
    integrity,
    noise,
    physics,
    pilot,
    predictions,
    protocol,
    sequence,
    verdicts,
)
from headgrid.experiment.check.finding import Finding, Note, Outcome, Verdict, run_gates, verdict
from headgrid.experiment.check.result import ArmResult, Figure, Result, read_result
from headgrid.experiment.check.run import Run, open_folder
from headgrid.experiment.design import analysis_of
from headgrid.experiment.journal import JournalError
from headgrid.experiment.records import block_times, of_kind
from headgrid.experiment.stats import PHASES, UNIT_LAUNCH, summarise
from headgrid.spec.hardware import Hardware, find_hardware


def run_physics(run: Run) -> Outcome:
    """The gates for anyone's results, on the figures that the journal gives."""
    if run.model is None or run.workload is None:
        yield Note("the design's model or workload is of another version: the physics gate did not run")
        return
    arms = summarise(run.design, run.records)["arms"]
    result = _result_of(run, arms)
    yield from run_gates(physics.GATES, result)
    if result.hardware is not None:
        yield from _links(run, arms, result.hardware)


def _result_of(run: Run, rows: Sequence[Mapping[str, Any]]) -> Result:
    """The run, of which these are the summary's arms, as a claim like any other's."""
    names = {name for record in of_kind(run.records, "launch") for name in record["device_names"]}
    try:
        hardware = find_hardware(names.pop()) if run.design["device"] == "cuda" and len(names) == 1 else None
    except InvalidInput:
        hardware = None
    arms = tuple(_arm(run, row) for row in rows if row["verified"])
    name = run.design["name"]
    return Result(name=name, hardware=hardware, model=run.model, workload=run.workload, arms=arms)


def _independent(figure: Mapping[str, Any], analysis: int) -> int | None:
    """How many independent values an interval is of; None where they may depend, and SD and n do not make it."""
    return figure["n"] if analysis == 1 or figure["unit"] == UNIT_LAUNCH else None


def _arm(run: Run, row: Mapping[str, Any]) -> ArmResult:
    analysis = analysis_of(run.design)
    names = {"decode_tpot_s": "tpot_s", "prefill_tokens_per_s": "prefill_tokens_per_s"}
    # Not decode_tokens_per_s: a mean of rates over blocks is not the rate of the mean time, so Little's law is not its.
    figures = {
        new: Figure(mean=row[old]["mean"], sd=row[old]["sd"], ci95=row[old]["ci95"], n=_independent(row[old], analysis))
        for old, new in names.items()
        if row[old] is not None
    }
    if row["memory_bytes"] is not None:
        parts = {
            "parameters_bytes": "parameters",
            "kv_cache_bytes": "kv_cache",
            "activations_bytes": "activations_peak",
        }
        held = {name: row["memory_bytes"][part] for name, part in parts.items()}
        figures |= {name: Figure(mean=size) for name, size in held.items() if size}
    linears = "float8" if run.linears(row["label"]) == "fp8" else None
    return ArmResult(label=row["label"], devices=run.design["ranks"], figures=figures, linears=linears)


def _links(run: Run, arms: Sequence[Mapping[str, Any]], hardware: Hardware) -> Iterator[Finding]:
    """No rank sends more than its link carries: neither in a call nor in a whole phase."""
    for arm in arms:
        spans = {phase: block_times(run.records, arm["label"], phase) for phase in PHASES}
        steps = {"prefill": 1, "decode": run.design["workload"]["decode_steps"]}
        for phase, times in spans.items():
            ops = [op for op in arm["traffic"] if op["phase"] == phase and op["collective"] != "recv"]
            calls = [(op["collective"], op["bytes_per_rank"], op["time_s"]) for op in ops if op["collective"] != "send"]
            if times:
                sent = sum(op["bytes_per_rank"] / SENT_TWICE.get(op["collective"], 1) for op in ops)
                calls.append(("all of it", sent, min(times.values()) / steps[phase]))
            for name, size, taken in calls:  # sends are posted: their time is not that of the transfer
                peak = hardware.peak_link_bytes_per_s * SENT_TWICE.get(name, 1)
                if taken and size / taken > peak:
                    what = f"{name} sends {size / taken / 1e9:.4g} GB/s, a link of {hardware.name} carries"
                    where = f"{arm['label']}, {phase}"
                    yield Finding("communication.link", where, f"{what} {peak / 1e9:.4g}")


SENT_TWICE = {"all_reduce": 2}
"""A switch that reduces sends half of what a ring does, and bytes are counted as a ring's."""


RUN_GATES: dict[str, Callable[[Run], Outcome]] = {
    gate.__name__: gate
    for gate in (
        integrity.design_hash,
        integrity.chain,
        integrity.environment_hash,
        integrity.summary_figures,
        sequence.declared_order,
        sequence.attempts,
        sequence.blocks,
        protocol.planted,
        protocol.sentinels,
        pilot.pilot,
        pilot.turns,
        pilot.reruns,
        clocks.clocks,
        clocks.block_clocks,
        clocks.pipeline_clocks,
        noise.digits,
        noise.copies,
        noise.spread,
        noise.twins,
        verdicts.verification,
        verdicts.control,
        verdicts.identity,
        verdicts.devices,
        verdicts.verified_times,
        predictions.memory,
        predictions.traffic,
        breakdown.breakdown,
        run_physics,
        ceilings.calibration,
        ceilings.measured_ceilings,
    )
}
"""In the order in which they report."""


def check_run(
    folder: Path, *, source_sha256: str | None = None, published: str | None = None, also: Outcome = ()
) -> Verdict:
    """All gates on a run folder. Raises InvalidInput if it is none.

    `source_sha256` is that of this source (`experiment.machine.source_sha256`): only a run that was made by it must
    have all its predictions. `published`: a link of the journal, or its beginning, that was made known before.
    `also`: what others found, for gates that this layer cannot have.
    """
    try:
        run = open_folder(folder, source_sha256)
    except JournalError as error:
        found = Finding("journal.damaged", "journal.jsonl", error.what)
        return verdict(str(folder), [found], ["journal"], {})
    said = [*run_gates(RUN_GATES, run), *also, *_published(run, published)]
    kinds = sorted({record["kind"] for record in run.records})
    examined = {"records": len(run.records)} | {kind: len(list(of_kind(run.records, kind))) for kind in kinds}
    return verdict(str(folder), said, RUN_GATES, examined)


def _published(run: Run, published: str | None) -> Iterator[Finding]:
    if published is not None and not run.seal.link.startswith(published):
        what = f"its last link is {run.seal.link}, {published} was published"
        yield Finding("journal.published", "journal.jsonl", what)


def check_file(path: Path) -> Verdict:
    """The physics gate on a file of results. Raises InvalidInput if it is none."""
    result = read_result(path)
    said = [*run_gates(physics.GATES, result), *_unknown(result)]
    examined = {"arms": len(result.arms), "figures": sum(len(arm.figures) for arm in result.arms)}
    return verdict(str(path), said, physics.GATES, examined | {"comparisons": len(result.comparisons)})


def _unknown(result: Result) -> Iterator[Note]:
    for name in ("hardware", "model", "workload"):
        if getattr(result, name) is None:
            yield Note(f"no {name} is stated: the bounds that follow from it were not applied")


def is_run(path: Path) -> bool:
    """Whether a path is to be checked as a run folder. Raises InvalidInput if there is nothing, or a folder of runs (a
    study of `headgrid scale`, say), which it lists.
    """
    if not path.exists():
        raise InvalidInput(f"{path} does not exist", legal=("a run folder", "FILE.json", "FILE.csv"))
    runs = sorted(each.parent for each in path.glob("*/design.json"))
    if runs and not (path / "design.json").exists():
        raise InvalidInput(
            f"{path} holds {len(runs)} run folders and is none itself",
            why="each run is checked against its own design and journal",
            legal=tuple(map(str, runs)),
            command=f"headgrid check {runs[0]}",
        )
    return path.is_dir()
