"""Was what the design declares for the measurement's own sake there: the planted slow-down, and the sentinels?"""

import itertools
from collections.abc import Iterator

from headgrid.experiment.check.clocks import CLOCK_READ_S
from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.design import ANALYSIS, analysis_of
from headgrid.experiment.records import Record, turns_s
from headgrid.experiment.sentinel_bands import KINDS
from headgrid.experiment.stats import PHASES


def planted(run: Run) -> Outcome:
    """One arm carries the slow-down that is declared, and it is the baseline's layout; none if none is declared."""
    if analysis_of(run.design) > ANALYSIS:
        yield Note(f"declared for analysis {analysis_of(run.design)}, this version has {ANALYSIS}")
    share = run.design.get("planted", 0.0)
    found = [arm for arm in run.design["arms"] if arm["role"] == "planted"]
    if len(found) != (share > 0):
        yield Finding("design.planted", "design.json", f"{len(found)} arms carry a planted slow-down of {share:.2%}")
    baseline = next(arm["layout"] for arm in run.design["arms"] if arm["role"] == "baseline")
    for arm in found:
        if arm["layout"] != baseline:
            yield Finding("design.planted", arm["label"], f"is {arm['layout']}, the baseline {baseline}")


def sentinels(run: Run) -> Outcome:
    """Before each timing and behind a launch's last one, on every rank, in the time that passed there."""
    if analysis_of(run.design) < 2:
        return
    for segment in segments(run.records):
        rest = (record for record in segment.records if record["kind"] != "breakdown")  # behind the last reading
        for before, record in itertools.pairwise(rest):
            if record["kind"] in ("block", "rerun") or (record["kind"] == "end" and record["completed"]):
                where = f"{segment.where}, {record['kind']} {record.get('block', '')}".rstrip()
                yield from _readings(run, before, record, where)


def _readings(run: Run, before: Record, record: Record, where: str) -> Iterator[Finding]:
    found = record.get("sentinels") or {}
    times = [found.get(kind) or [] for kind in KINDS]
    if any(len(ranks) != run.design["ranks"] or min(ranks) <= 0 for ranks in times):
        yield Finding("sentinels", where, f"not every rank has a time above 0 of {', '.join(KINDS)}")
        return
    turns = len(turns_s(record, "prefill")) if record["kind"] == "block" else 0
    took_s = sum(ranks[0] for ranks in times) + turns * sum(record.get(f"{phase}_s", [0.0])[0] for phase in PHASES)
    gap_s = record["time_s"] - before["time_s"]
    if took_s > gap_s + CLOCK_READ_S * (1 + took_s):
        yield Finding("sentinels", where, f"took {took_s:.4f} s with what was timed, within {gap_s:.4f} s")
