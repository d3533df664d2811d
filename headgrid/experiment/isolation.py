"""Was the machine left to the run? Contamination codes, and verdicts for blocks and figures: CLEAN, SUSPECT, INVALID.

Pure functions of design, journal and telemetry. Nothing is left out of a figure for its verdict, because what to leave
out must not be chosen after the fact; a figure that is not clean is marked wherever it is shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from headgrid.experiment import isolation_gpu, isolation_host, isolation_protocol, isolation_run
from headgrid.experiment.design import analysis_of
from headgrid.experiment.isolation_evidence import Check, Evidence, Finding
from headgrid.experiment.records import BlockKey, Record, latest_attempts, of_kind
from headgrid.experiment.telemetry import Telemetry
from headgrid.experiment.telemetry_series import PHASES, ranks_of_hosts

Verdict = Literal["CLEAN", "SUSPECT", "INVALID"]
CHECKS: tuple[Check, ...] = (
    *isolation_gpu.CHECKS,
    *isolation_host.CHECKS,
    *isolation_run.CHECKS,
    *isolation_protocol.CHECKS,
)
CODES: Mapping[str, str] = {code: meaning for check in CHECKS for code, meaning in check.codes.items()}
"""Every code and what it means."""
INVALID_SHARE = 0.05
"""A figure is invalid if more than this share of its blocks is; with fewer it is suspect."""
_WORST = ("CLEAN", "INFO", "SUSPECT", "INVALID")


def judge(design: Mapping[str, Any], records: Sequence[Record], telemetry: Telemetry | None) -> dict[str, Any]:
    """`isolation` of summary.json: verdicts of blocks and figures, the findings behind them, and what was not checked.

    Only blocks that are not clean are listed. A figure is one arm's one phase. With checks that could not be made,
    CLEAN means that those made found nothing.
    """
    due = [check for check in CHECKS if check.concerns(analysis_of(design))]
    hosts = _hosts(design, records, telemetry)
    findings: list[Finding] = []
    unchecked: dict[Check, str] = {}
    for check in due:
        for evidence in hosts if check.telemetry else hosts[:1]:
            where = f"host {evidence.host}: " if check.telemetry and len(hosts) > 1 else ""
            if (why := evidence.why_unchecked(check)) is not None:
                unchecked[check] = "; ".join(filter(None, (unchecked.get(check), where + why)))
            else:
                findings += [replace(found, text=where + found.text) for found in check.find(evidence)]
    findings = _distinct(findings)
    index = _Index(findings)
    blocks = _blocks(records)
    listed = [_block(index, key, arm) for key, arm in blocks]
    figures = [
        _figure(index, [key for key, label in blocks if label == arm["label"]], arm["label"], phase)
        for arm in design["arms"]
        for phase in PHASES
    ]
    verdicts = [row["verdict"] for row in listed]
    worst = max((row["verdict"] for row in figures if row["verdict"]), key=_WORST.index, default=None)
    return {
        "verdict": worst,
        "blocks": {verdict: verdicts.count(verdict) for verdict in ("CLEAN", "SUSPECT", "INVALID")},
        "flagged": [row for row in listed if row["verdict"] != "CLEAN"],
        "figures": figures,
        "findings": _told(findings, blocks),
        "checked": [code for check in due if check not in unchecked for code in check.codes],
        "unchecked": [{"code": code, "why": why} for check, why in unchecked.items() for code in check.codes],
    }


def _hosts(design: Mapping[str, Any], records: Sequence[Record], telemetry: Telemetry | None) -> list[Evidence]:
    """The journal with the samples of each host that had ranks."""
    sampled = telemetry.of_hosts() if telemetry is not None else {}
    return [Evidence(design, records, sampled.get(host), host) for host in ranks_of_hosts(records) or [0]]


def _distinct(findings: Iterable[Finding]) -> list[Finding]:
    """The first of those that say the same of the same place: a throttled GPU says it at every sample."""
    kept: dict[tuple[Any, ...], Finding] = {}
    for f in findings:
        kept.setdefault((f.code, f.severity, f.launch, f.block, f.arm, f.phase), f)
    return list(kept.values())


def _blocks(records: Sequence[Record]) -> list[tuple[BlockKey, str]]:
    """Timed blocks that count, arm by arm."""
    found = [r for r in of_kind(latest_attempts(records), "block") if not r.get("warmup")]
    return sorted({(BlockKey(r["launch"], r["block"]), r["arm"]) for r in found})


class _Index:
    """Findings by place: those of one block of one arm, and those that hold more widely."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self._exact: dict[tuple[BlockKey, str], list[Finding]] = {}
        self._wide: dict[Finding, None] = {}
        for found in findings:
            if found.launch is not None and found.block is not None and found.arm is not None:
                self._exact.setdefault((BlockKey(found.launch, found.block), found.arm), []).append(found)
            else:
                self._wide[found] = None

    def at(self, key: BlockKey, arm: str, phase: str | None = None) -> list[Finding]:
        """What concerns a block of an arm; only what concerns one phase of it, if one is given."""
        wide = [f for f in self._wide if f.launch in (None, key.launch) and f.block in (None, key.block)]
        found = [*self._exact.get((key, arm), ()), *(f for f in wide if f.arm in (None, arm))]
        return [f for f in found if phase is None or f.phase in (None, phase)]


def _verdict(findings: Iterable[Finding]) -> Verdict:
    severities = {found.severity for found in findings}
    return "INVALID" if "INVALID" in severities else "SUSPECT" if "SUSPECT" in severities else "CLEAN"


def _codes(findings: Iterable[Finding]) -> list[str]:
    return sorted({found.code for found in findings if found.severity != "INFO"})


def _block(index: _Index, key: BlockKey, arm: str) -> dict[str, Any]:
    found = index.at(key, arm)
    return {
        "launch": key.launch,
        "block": key.block,
        "arm": arm,
        "verdict": _verdict(found),
        "codes": _codes(found),
    }


def _figure(index: _Index, keys: Sequence[BlockKey], arm: str, phase: str) -> dict[str, Any]:
    per_block = [index.at(key, arm, phase) for key in keys]
    verdicts = [_verdict(found) for found in per_block]
    invalid = verdicts.count("INVALID") > INVALID_SHARE * len(verdicts)
    verdict: Verdict | None = "INVALID" if invalid else "CLEAN" if set(verdicts) <= {"CLEAN"} else "SUSPECT"
    return {
        "arm": arm,
        "phase": phase,
        "verdict": verdict if keys else None,
        "codes": sorted({code for found in per_block for code in _codes(found)}),
    }


def _told(findings: Sequence[Finding], blocks: Sequence[tuple[BlockKey, str]]) -> list[dict[str, Any]]:
    """One row for each code and severity, the gravest first: how many timed blocks it concerns, and an example."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for found in findings:
        groups.setdefault((found.code, found.severity), []).append(found)
    rows = [
        {
            "code": code,
            "severity": severity,
            "meaning": CODES[code],
            "blocks": _concerned(group, blocks),
            "of_blocks": len(blocks),
            "example": group[0].text,
        }
        for (code, severity), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (-_WORST.index(row["severity"]), row["code"]))


def _concerned(group: Sequence[Finding], blocks: Sequence[tuple[BlockKey, str]]) -> int:
    index = _Index(group)
    return sum(bool(index.at(key, arm)) for key, arm in blocks)


def sentences(isolation: Mapping[str, Any]) -> list[str]:
    """Warnings of the summary: one for each code that makes figures suspect or invalid."""
    return [
        f"{row['code']}, {row['severity'].lower()}, {row['blocks']} of {row['of_blocks']} blocks: {row['example']}."
        for row in isolation["findings"]
        if row["severity"] != "INFO"
    ]


def verdict_of(isolation: Mapping[str, Any] | None, arm: str, phase: str) -> Verdict | None:
    """The verdict of one figure; None where isolation was not judged."""
    rows = isolation["figures"] if isolation else ()
    return next((row["verdict"] for row in rows if (row["arm"], row["phase"]) == (arm, phase)), None)
