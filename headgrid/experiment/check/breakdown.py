"""Where steps spent their time: parts against wholes, bytes against predictions, traces against records."""

import gzip
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from headgrid.experiment.breakdown.intervals import account
from headgrid.experiment.breakdown.perfetto import STEP
from headgrid.experiment.breakdown.summary import CLOSED, PARTS, closure
from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.records import Record, block_times, of_kind
from headgrid.layout.layout import Layout
from headgrid.layout.traffic import decode_collectives, prefill_collectives
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

ROUNDED_S = 1e-8
"""By how much rounded seconds may miss each other."""
EXCESS, EXCESS_S = 0.1, 2e-3
"""What the parts may exceed a step by, or on a GPU miss of it: more is no matter of clocks."""
LEAST_OF_TIMED = 0.7
"""Of a timed prefill, what one that is watched takes at least (on GPUs, where it takes a second or more)."""


def breakdown(run: Run) -> Outcome:
    """Every record of a pass that was watched, and the files that the newest ones name."""
    layouts = dict(run.arms)
    yield from _counts(run)
    newest: dict[tuple[str, str], Record] = {}
    for record in of_kind(run.records, "breakdown"):
        label, phase = record["arm"], record["phase"]
        where = f"launch {record['launch']}, {label}, {phase}"
        newest[label, phase] = record
        yield from _parts(run, record, layouts[label], where)
        yield from _rows(run, record, where)
        yield from _sent(run, record, layouts[label], where)
    for (label, phase), record in newest.items():
        yield from _timed(run, record)
        yield from _trace(run, record, f"{label}, {phase}")


def _counts(run: Run) -> Iterator[Finding]:
    """One for each verified arm and phase of a launch at most, behind its blocks."""
    for segment in segments(run.records):
        found = Counter((record["arm"], record["phase"]) for record in segment.of("breakdown"))
        verified = {record["arm"] for record in segment.of("verify") if record["verified"] is True}
        for (arm, phase), count in found.items():
            if count > 1 or arm not in verified or phase not in ("prefill", "decode"):
                what = f"{count} breakdown records of {arm} in {phase}"
                yield Finding("journal.counts", segment.where, f"{what}; one of each verified arm and phase is due")
        kinds = [record["kind"] for record in segment.records]
        if "breakdown" in kinds and "block" in kinds[kinds.index("breakdown") :]:
            yield Finding("journal.sequence", segment.where, "a block was timed behind a pass that was watched")


def _parts(run: Run, record: Record, layout: Layout, where: str) -> Outcome:
    """Of each rank: parts are none below nothing, on a GPU exactly all of its span, and together its step."""
    if len(record["ranks"]) != layout.ranks:
        yield Finding("breakdown.parts", where, f"parts of {len(record['ranks'])} ranks, there are {layout.ranks}")
    missed: list[float] = []
    for rank, parts in enumerate(record["ranks"]):
        known = [parts[name] for name in (*PARTS, "step_s") if parts[name] is not None]
        if min(known) < 0:
            yield Finding("breakdown.parts", where, f"rank {rank} has a part of {min(known)} s")
        miss = closure(parts)
        if miss is None:
            continue
        missed.append(miss)
        total = sum(parts[name] for name in PARTS)
        if parts["span_s"] is not None and abs(total - parts["span_s"]) > ROUNDED_S:
            what = f"rank {rank}'s parts are {total:.9f} s of a trace of {parts['span_s']:.9f} s"
            yield Finding("breakdown.parts", where, what)
        too_little = run.design["device"] == "cuda" and miss < 0
        if (miss > 0 or too_little) and abs(total - parts["step_s"]) > EXCESS * parts["step_s"] + EXCESS_S:
            what = f"rank {rank}'s parts are {total:.6f} s of a step of {parts['step_s']:.6f} s"
            yield Finding("breakdown.closure", where, what)
    if missed and max(map(abs, missed)) > CLOSED:
        yield Note(f"{where}: the breakdown's parts miss a step by {max(missed, key=abs):+.1%}")


def _rows(run: Run, record: Record, where: str) -> Iterator[Finding]:
    """Of each kind of call: waiting and transfer are its time, exposed and hidden too; together they are the ranks'."""
    for row in record["calls"]:
        named = f"{where}, {row['role']} by {row['collective']}"
        for parts in (("wait_s", "transfer_s"), ("exposed_s", "hidden_s")):
            values = [row[part] for part in parts]
            if None not in values and abs(sum(values) - row["time_s"]) > ROUNDED_S:
                what = f"{' and '.join(parts)} are {sum(values):.9f} s, the calls take {row['time_s']:.9f} s"
                yield Finding("breakdown.calls", named, what)
            if any(value is not None and value < 0 for value in values):
                yield Finding("breakdown.calls", named, f"{' or '.join(parts)} is below nothing")
        if row["transfer_s"] and abs(row["bytes"] / row["ranks"] / row["transfer_s"] / row["bus_bytes_per_s"] - 1) > (
            1e-6 + 1 / row["bus_bytes_per_s"]
        ):
            yield Finding("breakdown.calls", named, f"{row['bus_bytes_per_s']} B/s are not bytes over transfer")
    ranks = [parts["exposed_s"] for parts in record["ranks"]]
    rows = [row["exposed_s"] for row in record["calls"]]
    if None in ranks or None in rows:
        return
    of_ranks, of_calls = sum(ranks), sum(row["exposed_s"] * row["ranks"] for row in record["calls"])
    slack = ROUNDED_S * (1 + len(rows)) * len(ranks)  # on a GPU calls may overlap each other, never on a CPU's thread
    if of_ranks > of_calls + slack or (run.design["device"] == "cpu" and of_calls > of_ranks + slack):
        what = f"ranks wait {of_ranks:.9f} s in all, the collectives' exposed time is {of_calls:.9f} s"
        yield Finding("breakdown.calls", where, what)


def _sent(run: Run, record: Record, layout: Layout, where: str) -> Iterator[Finding]:
    """Calls and bytes of all ranks, by kind and axis, against the layout's pure functions made again."""
    if record["as_predicted"] is not True:
        yield Finding("breakdown.bytes", where, "other collectives than predicted, and yet the arm is verified")
        return
    if run.model is None or run.workload is None:
        return
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in record["calls"]:
        sums = found[row["collective"], row["axis"]]
        sums[0] += row["calls"]
        sums[1] += row["bytes"]
    due = _predicted(run.model, layout, run.workload, record["phase"])
    for key in sorted({*found, *due}):
        has, expected = tuple(found.get(key, (0, 0))), tuple(record["steps"] * value for value in due.get(key, (0, 0)))
        if has != expected:
            what = f"{key[0]} on {key[1]}: {has[0]} calls of {has[1]} bytes, the layout gives {expected[0]} of"
            yield Finding("breakdown.bytes", where, f"{what} {expected[1]}")


@lru_cache(maxsize=256)
def _predicted(
    model: ModelSpec, layout: Layout, workload: Workload, phase: str
) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes of all ranks in one step."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for rank in range(layout.ranks):
        predicted = (prefill_collectives if phase == "prefill" else decode_collectives)(model, layout, workload, rank)
        for call, count in predicted.items():
            calls, size = sums.get((call.kind, call.axis), (0, 0))
            sums[call.kind, call.axis] = calls + count, size + count * call.bytes
    return sums


def _timed(run: Run, record: Record) -> Iterator[Finding]:
    """A prefill does not become faster by being watched."""
    times = block_times(run.records, record["arm"], "prefill")
    if record["phase"] != "prefill" or not times or run.design["device"] == "cpu" or min(times.values()) < 1.0:
        return
    watched = max(rank["step_s"] for rank in record["ranks"])
    if watched < LEAST_OF_TIMED * min(times.values()):
        what = f"took {watched:.3f} s when it was watched, {min(times.values()):.3f} s at least when it was timed"
        yield Finding("breakdown.closure", f"{record['arm']}, prefill", what)


def _trace(run: Run, record: Record, where: str) -> Outcome:
    """The trace's bytes are those that were written, and on GPUs its bars give the record's parts."""
    named = record["trace"]
    if named is None or named["file"] is None:
        return
    path = run.folder / "traces" / Path(named["file"]).name
    if not path.exists():
        yield Note(f"{where}: {named['file']} is not here")
        return
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != named["sha256"]:
        what = f"{named['file']} is not the file that was written"
        cut = Note(f"{where}: {what}, or a later attempt wrote it and was cut")
        yield cut if _begun_again(run, record) else Finding("breakdown.trace", where, what)
    elif run.design["device"] == "cuda" and named["cut"] is None:
        yield from _drawn(json.loads(gzip.decompress(data)), record, where)


def _begun_again(run: Run, record: Record) -> bool:
    """Whether another attempt or launch began behind the record: it may have written its trace, and been cut."""
    behind = itertools.dropwhile(lambda each: each is not record, run.records)
    return any(each["kind"] == "launch" for each in behind)


def _drawn(trace: dict[str, Any], record: Record, where: str) -> Iterator[Finding]:
    bars: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    begun: dict[int, int] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            start = round(event["ts"] * 1e3)
            bars[event["pid"], event["cat"]].append((start, start + round(event["dur"] * 1e3)))
            if event["name"] == STEP:
                begun[event["pid"]] = start
    for rank, parts in enumerate(record["ranks"]):
        if None in (parts[name] for name in PARTS):  # its profiler gave nothing, and the record says why
            continue
        drawn = account(begun[rank], bars[rank, "compute"], bars[rank, "communication"])
        found = (drawn.compute, drawn.exposed, drawn.idle)
        for name, nanoseconds in zip(PARTS, found, strict=True):
            if abs(nanoseconds / 1e9 - parts[name]) > ROUNDED_S:
                what = f"rank {rank}'s {name} is {parts[name]:.9f}, its bars give {nanoseconds / 1e9:.9f}"
                yield Finding("breakdown.trace", where, what)
