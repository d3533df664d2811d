"""What the report says of the run as a measurement: planted slow-down, steady state, sentinels, tails, launches."""

from collections.abc import Iterator, Mapping
from typing import Any

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import MIN_LAUNCHES
from headgrid.experiment.stats import UNIT_LAUNCH
from headgrid.report.format import NOT_MEASURED, duration, percent

Summary = Mapping[str, Any]


def contestants(summary: Summary) -> dict[str, Any]:
    """The summary without the arm that was slowed down on purpose: it is no layout of its own."""
    planted = {arm["label"] for arm in summary["arms"] if arm["role"] == "planted"}
    shown = {**summary, "arms": [arm for arm in summary["arms"] if arm["label"] not in planted]}
    if telemetry := summary.get("telemetry"):
        shown["telemetry"] = {**telemetry, "arms": [a for a in telemetry["arms"] if a["label"] not in planted]}
    return shown


def rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Name and result of each of these checks; nothing for runs that did not declare them."""
    if "resolution" in summary:
        yield "Planted slow-down", planted_line(summary)
        if "pilot" in summary:
            yield "Length of a block", pilot_line(summary)
            yield "Blocks run again", rerun_line(summary)
        yield "Steady state", steady_line(summary)
        yield "Sentinels", sentinel_line(summary)
        yield "Tail percentiles", tail_line(summary)


def planted_line(summary: Summary) -> str:
    """What was planted, what was recovered, and what this run could have seen."""
    resolution = summary.get("resolution")
    if not resolution:
        return "none was planted"
    share = percent(resolution["planted"])
    return f"{share} planted in a copy of the baseline; " + "; ".join(map(_recovered, resolution["phases"]))


def _recovered(row: Mapping[str, Any]) -> str:
    if row["ci95"] is None:
        return f"{row['phase']}: {NOT_MEASURED}"
    low, high = (percent(edge) for edge in row["ci95"])
    found = "found" if row["excludes_zero"] and row["holds_planted"] else "NOT found"
    if row["excludes_zero"] and not row["holds_planted"]:
        found = "found, but NOT at its size"
    detectable = percent(row["smallest_detectable"])
    return (
        f"{row['phase']}: {found}, {percent(row['recovered'])} recovered [{low}, {high}],"
        f" smallest detectable difference ±{detectable}"
    )


def pilot_line(summary: Summary) -> str:
    """What a block is, by which pilot, and how the turns that were timed depended on one another."""
    pilot = summary["pilot"]
    if not pilot:
        return "one turn of each arm: there was no pilot"
    shown = "beyond chance" if pilot["tau_shown"] else "not beyond chance, so it asks for nothing"
    cut = "; more were asked for than a block may take" if pilot["capped"] else ""
    text = (
        f"{counted(pilot['turns'], 'turn')} of each arm{cut}. Pilot: {pilot['pilot_turns']} turns of the baseline,"
        f" {duration(pilot['turn_s'])} at the median; autocorrelation time {pilot['tau_int']:.2g} turns ({shown};"
        " independent turns have 0.5)"
    )
    if not pilot["followed"]:
        return text
    taus = sorted(row["tau_int"] for row in pilot["followed"])
    span = f"{taus[0]:.2g}" + (f" to {taus[-1]:.2g}" if len(taus) > 1 else "")
    lasting = sum(row["tau_shown"] for row in pilot["followed"])
    return (
        f"{text}. Of the {sum(row['turns'] for row in pilot['followed']):,} turns then timed it was {span},"
        f" beyond chance in {lasting} of {counted(len(taus), 'launch', 'launches')}"
    )


def rerun_line(summary: Summary) -> str:
    """How many blocks the sentinels had run again, and what difference that makes."""
    found = summary["reruns"]
    if not found:
        return "none: without a pilot no band is known beforehand"
    text = f"{found['blocks']:,} of {found['of_blocks']:,} blocks were run again for a sentinel out of the pilot's band"
    if found["left_out_of_band"]:
        text += f"; {found['left_out_of_band']:,} more were not: each is once at most, and of a launch at most"
        text += f" {found['allowed_per_launch']:,}"
    if found["still_out"]:
        text += f"; in {found['still_out']:,} a sentinel was out again"
    changes = [(abs(row["first_tries"] / row["ratio"] - 1), row) for row in found["sensitivity"] if row["first_tries"]]
    if changes:
        _, row = max(changes, key=lambda each: each[0])
        what = f"{row['a']} / {row['b']}, {row['phase']}: {row['ratio']:.4f} and {row['first_tries']:.4f}"
        text += f". The ratio that first tries would change most: {what} with them"
    return text


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def steady_line(summary: Summary) -> str:
    """From which block on each phase was steady, launch by launch where they differ."""
    found = summary["steady"]
    if not found:
        return f"{NOT_MEASURED}: too few turns"
    parts = []
    for phase in dict.fromkeys(row["phase"] for row in found):
        mine = [row for row in found if row["phase"] == phase]
        lost = [row for row in mine if row["from_block"] is None]
        known = [row["from_block"] for row in mine if row["from_block"] is not None]
        told = [f"no steady state in {len(lost)} of {len(mine)} launches"] if lost else []
        told += [f"steady from block {max(known)}"] if known else []
        parts.append(f"{phase}: {', else '.join(told)}")
    return f"{'; '.join(parts)}, counted from 0, of which {found[0]['warmup_blocks']} declared as warm-up"


def sentinel_line(summary: Summary) -> str:
    """How often work that never changes took another time."""
    found = summary["sentinels"]
    if not found:
        return f"{NOT_MEASURED}: too few readings"
    parts = (
        f"{row['sentinel'].replace('_', '-')} {duration(row['median_s'])}"
        f" ({row['outside']} of {row['readings']} readings out of band)"
        for row in found
    )
    return "; ".join(parts)


def tail_line(summary: Summary) -> str:
    """Percentiles of block times where there are any; else why not."""
    tails = summary["tails"]
    shown = {arm["label"] for arm in contestants(summary)["arms"]}
    told = [row for row in tails["blocks"] if row["seconds"] is not None and row["label"] in shown]
    parts = []
    for row in told:
        low, high = (duration(edge) for edge in row["ci95"]) if row["ci95"] else (NOT_MEASURED, NOT_MEASURED)
        what = f"{row['label']} {row['phase']} p{100 * row['quantile']:g}"
        parts.append(f"{what} {duration(row['seconds'])} [{low}, {high}]")
    if not told:
        parts += sorted({row["refused"] for row in tails["blocks"]})[:1]
    return f"of block times: {'; '.join(parts) or NOT_MEASURED}; of single decode steps: {tails['per_step']}"


def reproducible(launches: int, text: str) -> str:
    """What launches differ by; of fewer than MIN_LAUNCHES that says nothing about another."""
    if launches >= MIN_LAUNCHES:
        return text
    return f"not shown: {launches} of the {MIN_LAUNCHES} launches that it takes. {text}"


def verdict(row: Mapping[str, Any]) -> str:
    """What may be claimed; beside it what the interval alone says, and that what was not declared claims nothing."""
    if row.get("family") == "exploratory":
        return f"{row['verdict']} (exploratory)"
    return claimed(row) if claimed(row) == row["verdict"] else f"{claimed(row)} ({row['verdict']} alone)"


def interval_of(summary: Summary) -> str:
    """What the intervals of comparisons are made by."""
    blocks = any((row["unit"] or UNIT_LAUNCH) != UNIT_LAUNCH for row in summary["comparisons"])
    if "resolution" in summary and blocks:
        return "allows for an unknown dependence of blocks on one another, and is"
    return "is Student's t"


def jointly(summary: Summary) -> str:
    """How verdicts of several comparisons are held, for runs that declared it."""
    if "resolution" not in summary:
        return ""
    return (
        " Verdicts against the baseline are held jointly (Holm, 5 %); comparisons among other arms are exploratory and"
        " claim nothing."
    )
