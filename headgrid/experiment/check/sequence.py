"""Did what was declared happen, in the declared order, each part once? Counts, order, attempts."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run, Segment, segments
from headgrid.experiment.design import Protocol, random_order
from headgrid.experiment.records import Record, done_blocks


def declared_order(run: Run) -> Outcome:
    """The order of the blocks is complete, and is the one that the seed draws."""
    design, arms = run.design, len(run.design["arms"])
    blocks = design["warmup_blocks"] + design["blocks"]
    if [len(launch) for launch in design["order"]] != [blocks] * design["launches"]:
        yield Finding("design.order", "design.json", f"order is not {design['launches']} launches of {blocks} blocks")
    elif any(sorted(block) != list(range(arms)) for launch in design["order"] for block in launch):
        yield Finding("design.order", "design.json", f"a block does not run each of the {arms} arms once")
    elif run.same_version:
        counts = {key: design[key] for key in ("launches", "blocks", "warmup_blocks", "seed")}
        if [[list(block) for block in launch] for launch in random_order(arms, Protocol(**counts))] != design["order"]:
            yield Finding("design.order", "design.json", f"the order is not what seed {design['seed']} draws")


def attempts(run: Run) -> Outcome:
    """Launches one after the other, each until it is complete; attempts numbered; nothing after the end."""
    if not run.records:
        yield Note("the journal is empty: nothing was run")
        return
    if run.records[0]["kind"] != "launch":
        yield Finding(
            "journal.sequence", "record 1", f"a journal begins with a launch, not with {run.records[0]['kind']}"
        )
    ended: set[int] = set()
    for segment in segments(run.records):
        if segment.launch not in range(run.design["launches"]):
            yield Finding("journal.sequence", segment.where, f"the design has {run.design['launches']} launches")
        if segment.launch in ended or segment.launch != len(ended):
            yield Finding("journal.sequence", segment.where, f"begins when {len(ended)} launches had ended")
        stated = segment.records[0].get("attempt", 0)
        if stated != segment.attempt:
            yield Finding("journal.attempts", segment.where, f"calls itself attempt {stated}")
        yield from _inside(run, segment)
        if any(record["completed"] is True for record in segment.of("end")):
            ended.add(segment.launch)
    if len(ended) < run.design["launches"]:
        yield Note(f"the run is incomplete: {len(ended)} of {run.design['launches']} launches ended")


def _inside(run: Run, segment: Segment) -> Iterator[Finding]:
    """Of one attempt: all records are of this launch, in the order in which a launch does things."""
    for record in segment.records:
        if record["launch"] != segment.launch:
            what = f"a {record['kind']} record of launch {record['launch']} is among its records"
            yield Finding("journal.sequence", segment.where, what)
    if segment.records[0]["ranks"] != run.design["ranks"]:
        what = f"has {segment.records[0]['ranks']} ranks, the design {run.design['ranks']}"
        yield Finding("journal.sequence", segment.where, what)
    kinds = [record["kind"] for record in segment.records]
    for first, then in (("launch", "control"), ("control", "verify"), ("verify", "block"), ("block", "end")):
        if first in kinds and then in kinds and len(kinds) - 1 - kinds[::-1].index(first) > kinds.index(then):
            yield Finding("journal.sequence", segment.where, f"a {first} record comes behind a {then} record")
    if kinds.count("end") > 1:
        yield Finding("journal.sequence", segment.where, f"has {kinds.count('end')} end records")
    yield from _examined(run, segment, reached="block" in kinds or "end" in kinds)


def _examined(run: Run, segment: Segment, reached: bool) -> Iterator[Finding]:
    """Each arm is examined once, and all of them before the first block."""
    yield from _controls(run, segment, reached)
    phases = ("prefill", "decode") if run.design["workload"]["decode_steps"] else ("prefill",)
    wanted: dict[str, list[Any]] = {"memory": [None], "verify": [None], "traffic": list(phases)}
    for kind, keys in wanted.items():
        expected = Counter((label, key) for label in run.labels for key in keys)
        found = Counter((record["arm"], record.get("phase")) for record in segment.of(kind))
        odd = found - expected if not reached else (found - expected) + (expected - found)
        for arm, phase in odd:
            what = f"{found[arm, phase]} {kind} records of {arm}" + (f" in {phase}" if phase else "")
            yield Finding("journal.counts", segment.where, f"{what} instead of {expected[arm, phase]}")


def _controls(run: Run, segment: Segment, reached: bool) -> Iterator[Finding]:
    """One for each kind of linears that an arm has; none for a single rank, where there is nothing to leave out."""
    wanted: set[str] = set()
    if run.design["control"] is not None:
        wanted = {"model", *(layout.linears for _, layout in run.arms)}
    found = [record.get("linears", "model") for record in segment.of("control")]
    if len(set(found)) < len(found) or not set(found) <= wanted or (reached and set(found) != wanted):
        has, due = (", ".join(names) or "none" for names in (found, sorted(wanted)))
        what = f"has negative controls by the floor of {has}; due are {due}"
        yield Finding("journal.counts", segment.where, what)


def blocks(run: Run) -> Outcome:
    """The blocks of every attempt are the declared ones in the declared order, without those that were done."""
    for segment in segments(run.records):
        done = done_blocks(run.records[: segment.start], segment.launch)
        expected = list(_turns(run, segment, done))
        found = [(record["block"], record["arm"], record.get("retry", 0)) for record in segment.of("block")]
        wrong = next((k for k, pair in enumerate(found) if k >= len(expected) or pair != expected[k]), None)
        if wrong is not None:
            due = "nothing" if wrong >= len(expected) else "block {} of {} (try {})".format(*expected[wrong])
            what = f"block {found[wrong][0]} of {found[wrong][1]} was timed when {due} was due"
            yield Finding("blocks.order", segment.where, what)
        elif segment.of("end") and len(found) < len(expected):
            what = f"ended with {len(found)} of the {len(expected)} timings that were due"
            yield Finding("blocks.counts", segment.where, what)
        for record in segment.of("block"):
            yield from _block(run, segment, record)


def _turns(run: Run, segment: Segment, done: list[int]) -> Iterator[tuple[int, str, int]]:
    """Block, arm, and 1 where the journal says that the block was run again (whether it had to be: `check.pilot`)."""
    verified = {record["arm"] for record in segment.of("verify") if record["verified"] is True}
    again = {record["block"] for record in segment.of("rerun")}
    for block, order in enumerate(run.design["order"][segment.launch]):
        for retry in range(0 if block in done else 1 + (block in again)):
            yield from ((block, run.labels[place], retry) for place in order if run.labels[place] in verified)


def _block(run: Run, segment: Segment, record: Record) -> Iterator[Finding]:
    """One timing: its own fields."""
    design, block = run.design, record["block"]
    where = f"{segment.where}, block {block} of {record['arm']}"
    if record.get("attempt", 0) != segment.attempt:
        yield Finding("journal.attempts", where, f"is of attempt {record['attempt']}")
    order = design["order"][segment.launch][block]
    if run.labels[order[record["position"]]] != record["arm"]:
        yield Finding("blocks.order", where, f"position {record['position']} belongs to another arm")
    if record["warmup"] is not (block < design["warmup_blocks"]):
        yield Finding("blocks.counts", where, f"warm-up is {record['warmup']}; {design['warmup_blocks']} blocks are")
    if record.get("decode_steps", design["workload"]["decode_steps"]) != design["workload"]["decode_steps"]:
        yield Finding("blocks.counts", where, f"{record['decode_steps']} decode steps instead of the declared ones")
    for phase in ("prefill_s", "decode_s"):
        times = record[phase]
        if len(times) != design["ranks"]:
            yield Finding("blocks.counts", where, f"{phase} of {len(times)} ranks, there are {design['ranks']}")
        if not all(isinstance(seconds, float) and 0 < seconds < float("inf") for seconds in times):
            yield Finding("blocks.counts", where, f"{phase} holds what is no time")
