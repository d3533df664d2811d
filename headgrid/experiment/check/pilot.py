"""Was the length of blocks what the pilot gives, and were the blocks run again that the rule says, and no others?"""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from headgrid.experiment.check.clocks import CLOCK_READ_S
from headgrid.experiment.check.finding import Finding, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.pilot import PilotRule, pilot_of, rule_of, settle
from headgrid.experiment.records import Record, is_verified, of_kind
from headgrid.experiment.reruns import decisions
from headgrid.experiment.sentinel_bands import KINDS
from headgrid.experiment.stats import PHASES

ROUNDED_S = 2e-9
"""By how much means of rounded seconds may miss each other."""
ONE_TURN = ("turns", "retry")


def pilot(run: Run) -> Outcome:
    """One pilot of the baseline, before any timed block, and its outcome made again from its turns."""
    rule, found = rule_of(run.design), list(of_kind(run.records, "pilot"))
    baseline = next(arm["label"] for arm in run.design["arms"] if arm["role"] == "baseline")
    timed = [record for record in of_kind(run.records, "block") if not record["warmup"]]
    if rule is None:
        if found or any(key in record for record in timed for key in ONE_TURN):
            yield Finding("pilot.declared", "journal.jsonl", "there was a pilot, and the design declares none")
        return
    if len(found) > 1 or (timed and is_verified(run.records, baseline) and not found):
        yield Finding("pilot.declared", "journal.jsonl", f"{len(found)} pilots; the design declares one")
    for record in found[:1]:
        where = f"launch {record['launch']}, pilot"
        place = run.records.index(record)
        early = [each for each in of_kind(run.records[:place], "block") if not each["warmup"]]
        if record["arm"] != baseline or record["launch"] or early:
            what = f"is of {record['arm']} behind {len(early)} timed turns; the baseline's, in front of all, is due"
            yield Finding("pilot.declared", where, what)
        yield from _made_again(rule, record, where)
        yield from _warm_readings(run.records[:place], record, where)
        own = [values[-len(record["prefill_s"]) - 1 :] for values in _times(record)]
        took_s, passed_s = sum(map(sum, own)), record["time_s"] - run.records[place - 1]["time_s"]
        if took_s > passed_s + CLOCK_READ_S * (1 + took_s):
            yield Finding("pilot.outcome", where, f"its turns took {took_s:.4f} s within {passed_s:.4f} s")


def _times(record: Record) -> list[list[float]]:
    return [record[f"{phase}_s"] for phase in PHASES] + [record["sentinels"][kind] for kind in KINDS]


def _made_again(rule: PilotRule, record: Record, where: str) -> Iterator[Finding]:
    """Its number of turns, its readings, and what was decided by them."""
    times = [record[f"{phase}_s"] for phase in PHASES]
    before = len(record["sentinels"][KINDS[0]]) - len(times[0])  # of the warm-up: see `_warm_readings`
    due = rule.turns_due(times[0][0] + times[1][0], before)
    if any(len(series) != due for series in times):
        yield Finding("pilot.outcome", where, f"{len(times[0])} turns; {due} are due")
        return
    if min(min(series) for series in _times(record)) <= 0:
        yield Finding("pilot.outcome", where, "holds what is no time")
        return
    made = settle(rule, *times)._asdict()
    for name, value in made.items():
        if not math.isclose(record[name], value, rel_tol=1e-6):
            yield Finding("pilot.outcome", where, f"states {name} {record[name]}, its turns give {value}")


def _warm_readings(records: Sequence[Record], record: Record, where: str) -> Iterator[Finding]:
    """Its readings are those behind each warm-up turn of the attempt, then one behind each turn of its own."""
    begun = max((n for n, each in enumerate(records) if each["kind"] == "launch"), default=0)
    warm = [each["sentinels"] for each in of_kind(records[begun:], "block")]
    for kind in KINDS:
        found, told = record["sentinels"][kind], [max(each[kind]) for each in warm[1:]]
        if len(found) != max(1, len(warm)) + len(record["prefill_s"]) or found[: len(told)] != told:
            yield Finding("pilot.outcome", where, f"{kind} has other readings than warm-up and pilot give")


def turns(run: Run) -> Outcome:
    """Each arm in each block has the pilot's number of turns, one behind the other, whose mean is the block's time."""
    if rule_of(run.design) is None:
        return
    found = pilot_of(run.records)
    behind = run.records.index(found) if found else len(run.records)
    for segment in segments(run.records):
        for place, record in enumerate(segment.records, start=segment.start):
            if record["kind"] == "block":
                due = found["turns"] if found and place > behind else 1
                where = f"{segment.where}, block {record['block']} of {record['arm']}"
                yield from _turns(record, due, where)


def _turns(record: Record, due: int, where: str) -> Iterator[Finding]:
    for phase in PHASES:
        taken, starts = record["turns"][f"{phase}_s"], record["turns"][f"{phase}_start_s"]
        if len(taken) != due or len(starts) != due:
            yield Finding("blocks.turns", where, f"{len(taken)} turns of {phase}; the pilot gives {due}")
            continue
        ranks, mean = record[f"{phase}_s"], fmean(taken)
        slowest, most = max(ranks), sum(ranks) + ROUNDED_S * len(ranks)  # turns may have different slowest ranks
        within = slowest - ROUNDED_S <= mean <= most
        if min(taken) <= 0 or not within or (due == 1 and slowest != taken[0]):
            what = f"a rank took {slowest:.9f} s of {phase} on average, the slowest ranks of its turns {mean:.9f}"
            yield Finding("blocks.turns", where, what)
        if abs(starts[0] - record[f"{phase}_start_s"]) > 1e-6:
            yield Finding("blocks.turns", where, f"{phase} began at another time than its first turn")


def reruns(run: Run) -> Outcome:
    """Blocks were run again where the sentinels and the rule say so, and nowhere else."""
    rule = rule_of(run.design)
    if rule is None:
        return
    for decision in decisions(rule, run.design["blocks"], run.records):
        tried = decision.tried
        where = f"launch {tried.launch}, block {tried.block}"
        if decision.due and not decision.was:
            (kind, ratio), *_ = decision.out
            what = f"{kind} beside it took {ratio:.2f} times the pilot's median, and it was not run again"
            yield Finding("blocks.rerun", where, what)
        if decision.was and not decision.due:
            reason = "it or too many others had been already" if decision.out else "no sentinel was out of its band"
            yield Finding("blocks.rerun", where, f"was run again, and {reason}")
    yield from _in_place(run)


def _in_place(run: Run) -> Iterator[Finding]:
    """Between a first try's last arm and the other try's first, or where a run was cut."""
    for segment in segments(run.records):
        for n, record in enumerate(segment.records):
            if record["kind"] != "rerun":
                continue
            before, behind = segment.records[n - 1], segment.records[n + 1 : n + 2]
            around = [(each["kind"], each.get("block"), each.get("retry")) for each in (before, *behind)]
            if around != [("block", record["block"], retry) for retry in range(len(around))]:
                where = f"{segment.where}, block {record['block']}"
                yield Finding("blocks.rerun", where, "is called to be run again where it had not just been run")
