"""Nothing runs faster than the machine was measured to do, beyond what measuring can miss."""

from collections.abc import Iterator
from typing import Any

from headgrid.errors import HeadgridError
from headgrid.experiment.calibrate_fit import fit_line
from headgrid.experiment.check import physics
from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run
from headgrid.experiment.records import block_times, is_verified, of_kind
from headgrid.layout.layout import Layout
from headgrid.layout.reads import fullest
from headgrid.spec.calibration import Calibration, Cost, Measured, from_dict

TOLERATED = 1.05
"""Over the best window ever seen, that of the cool device included, by which a run may be faster.

A ceiling is a measurement: data of which fewer bits change than of random ones let a device at its power limit clock
higher, other shapes run a few percent faster than the calibrated ones (658 to 685 TFLOP/s among the products of the
seed's layer on an H200), and blocks scatter. So the bound is the best window: that the median is beaten is noise.
"""
SAME = 1e-6
"""Of figures that are computed again."""


def calibration(run: Run) -> Outcome:
    """The calibration is what was written, of the devices that ran, and its lines are those of its points."""
    if not run.design.get("calibration"):
        return
    try:
        found = from_dict(run.design["calibration"])
    except HeadgridError as error:
        yield Finding("calibration.content", "design.json", error.what)
        return
    names = {name for record in of_kind(run.records, "launch") for name in record["device_names"]}
    here = {run.env.get("cpu")} if run.design["device"] == "cpu" else names
    if run.records and (found.device, {found.device_name}) != (run.design["device"], here):
        what = f"is of {found.device} ({found.device_name}), the run used {', '.join(map(str, sorted(here, key=str)))}"
        yield Finding("calibration.device", "design.json", what)
    if found.device == "cpu" and found.ranks != run.design["ranks"]:
        what = f"is of {found.ranks} ranks that shared a CPU, the run had {run.design['ranks']}"
        yield Finding("calibration.device", "design.json", what)
    for cost in found.collectives:
        yield from _line(cost)


def _line(cost: Cost) -> Iterator[Finding]:
    made = fit_line([point.size_bytes for point in cost.points], [point.median_s for point in cost.points])
    for name, value in made._asdict().items():
        if not _same(getattr(cost, name), value):
            what = f"states {name} {getattr(cost, name)}, its points give {value}"
            yield Finding("calibration.fit", f"{cost.kind} of {cost.ranks} ranks", what)


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(abs(a - b) <= SAME * max(abs(a), abs(b), 1e-6) for a, b in pairs)


def measured_ceilings(run: Run) -> Outcome:
    """No verified arm is faster than the calibration's best window and TOLERATED allow, in prefill or in decode.

    Ceilings that had not settled bound nothing: they say so in a note.
    """
    if run.model is None or run.workload is None or not run.design.get("calibration"):
        return
    try:
        found = from_dict(run.design["calibration"])
    except HeadgridError:
        return  # `calibration` says so
    for label, layout in run.arms:
        if is_verified(run.records, label):
            yield from _prefill(run, label, layout, found)
            yield from _decode(run, label, layout, found)


def _mean_s(run: Run, label: str, phase: Any) -> float | None:
    times = list(block_times(run.records, label, phase).values())
    return sum(times) / len(times) if times else None


def _prefill(run: Run, label: str, layout: Layout, found: Calibration) -> Iterator[Finding | Note]:
    """Products at their rate, and attention at its own or theirs, whichever is higher."""
    assert run.model is not None and run.workload is not None
    taken, workload = _mean_s(run, label, "prefill"), run.workload
    dtype = "float8" if layout.linears == "fp8" and found.device == "cuda" else workload.dtype
    kernels = [kernel.flop_per_s for kernel in found.products if kernel.dtype == dtype]
    others = [k.flop_per_s for k in (*found.products, *found.attention) if k.dtype == workload.dtype]
    if taken is None or not kernels or not others:
        return
    if not all(each.settled for each in (*kernels, *others)):
        yield Note(f"calibrated products of {dtype} had not settled: they bound no prefill")
        return
    linear = physics.linear_flops(run.model, workload)
    rest = max(0, physics.model_flops(run.model, workload) - linear)
    least = (linear / _best(kernels) + rest / _best(others)) / layout.ranks
    if taken * TOLERATED < least:
        what = f"prefill took {taken:.4g} s, {layout.ranks} devices need {least:.4g} s at the best that was measured"
        yield Finding("ceiling.prefill", label, what)


def _best(figures: list[Measured]) -> float:
    return max(figure.best for figure in figures)


def _decode(run: Run, label: str, layout: Layout, found: Calibration) -> Iterator[Finding | Note]:
    """The fullest rank's bytes, but for what the caches may have kept from the step before."""
    assert run.model is not None and run.workload is not None
    taken, steps = _mean_s(run, label, "decode"), run.workload.decode_steps
    if taken is None or not steps:
        return
    memory = [found.copy_bytes_per_s, found.read_bytes_per_s]
    if not all(each.settled for each in memory):
        yield Note("calibrated memory bandwidth had not settled: it bounds no decode")
        return
    size = fullest(run.model, layout, run.workload).total_bytes - (found.cache_bytes or 0)
    least = size / _best(memory)
    if taken / steps * TOLERATED < least:
        what = f"TPOT {taken / steps * 1e3:.4g} ms, reading {size / 1e9:.4g} GB takes {least * 1e3:.4g} ms at the best"
        yield Finding("ceiling.decode", label, f"{what} bandwidth that was measured")
