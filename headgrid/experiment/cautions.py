"""What a reader must know before quoting a figure: sentences, made from the record alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headgrid.experiment import resolution
from headgrid.experiment.design import SENSITIVE, analysis_of
from headgrid.experiment.records import MIN_LAUNCHES, Record, latest_attempts, missing_blocks, of_kind
from headgrid.layout.layout import parse_layout
from headgrid.layout.placement import slices_apart


def cpu_warning(ranks: int, cores: int | None = None) -> str:
    """The sentence that every result from a CPU carries."""
    host = f"{cores} cores" if cores else "this host's cores"
    return f"Times of {ranks} ranks on {host} say nothing about GPUs; the accuracy, the bytes and the memory do."


def _accuracy_warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    for arm in summary["arms"]:
        if not arm["verified"]:
            check = arm["verify"] or {"reason": "it was not checked"}
            reason = check["reason"] or "a check in an earlier launch failed"
            yield f"{arm['label']} is not verified ({reason}); its times are withheld."
        if any(row["as_predicted"] is False for row in arm["traffic"]):
            yield f"{arm['label']} moved other bytes than its layout predicts."
    control = summary["control"]
    if control is None:
        yield "No negative control was run, so nothing shows that the accuracy check can fail."
    elif not control["rejected"]:
        yield "The negative control passed the accuracy check: no verdict on accuracy in this run can be trusted."
    elif (control["sensitivity"] or 0.0) <= SENSITIVE:
        yield "The model is not sensitive enough: the negative control moves its logits by 10 % or less."


def _noise_warnings(design: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    twins = {arm["label"] for arm in design["arms"] if arm["role"] == "aa"}
    yield from resolution.sentences(summary.get("resolution"))
    if analysis_of(design) > 1 and summary["resolution"] is None:
        yield "No slow-down was planted, so nothing shows that this run could find one."
    if not twins:
        yield "No A/A arm was run, so this machine's own false differences are unknown."
    for row in summary["comparisons"]:
        if row["a"] not in twins or row["ci95"] is None:
            continue
        low, high = row["ci95"]
        if not low <= 1 <= high:
            yield (
                f"In {row['phase']} this machine called two copies of the same arm different (ratio {row['ratio']:.3f},"
                f" 95 % interval {low:.3f} to {high:.3f}): differences of this size between arms mean nothing."
            )
        elif row["verdict"] != "equivalent":
            yield (
                f"In {row['phase']} this machine cannot resolve the margin of {design['margin']:.1%}: two copies of the"
                f" same arm differ by anything from {low - 1:+.1%} to {high - 1:+.1%}."
            )


def _replication_warnings(records: Sequence[Record], summary: Mapping[str, Any]) -> Iterator[str]:
    launches = len({record["launch"] for record in of_kind(records, "block") if not record.get("warmup")})
    if 0 < launches < MIN_LAUNCHES:
        yield (
            f"With {launches} of the {MIN_LAUNCHES} launches that are needed, the intervals describe only what was"
            " launched; another launch may differ by more."
        )
    if any(row["ratio"] is not None and row["ci95"] is None for row in summary["comparisons"]):
        yield "Where there is only one block there is no interval, and the verdict is inconclusive whatever the ratio."


def _identity_warnings(design: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    launches = list(of_kind(records, "launch"))
    if any(record["design_hash"] != design["hash"] for record in launches):
        yield "A launch ran another design than the one in this folder."
    for key, what in (("input_sha256", "inputs"), ("weights_sha256", "weights"), ("device_names", "devices")):
        if len({str(record.get(key)) for record in launches}) > 1:
            yield f"The launches had different {what}."


def _completeness_warnings(design: Mapping[str, Any], records: Sequence[Record], complete: bool) -> Iterator[str]:
    triples = [
        (record["launch"], record["block"], record["arm"])
        for record in of_kind(latest_attempts(records), "block")
        if not record.get("warmup")
    ]
    if len(triples) != len(set(triples)):
        yield "Some blocks are in the journal twice; the first of each is used."
    if complete:
        return
    missing, asked = missing_blocks(design, records)
    yield "The run is incomplete" + (f": {missing} of {asked} timed blocks are missing." if missing else ".")


def _host_warnings(design: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    """Where ranks ran on several hosts: slices whose exchange crosses hosts, and what goes from host to host."""
    placements = {tuple(record.get("hosts") or [0] * record["ranks"]) for record in of_kind(records, "launch")}
    several = sorted(hosts for hosts in placements if len(set(hosts)) > 1)
    if len(placements) > 1:
        yield "The launches had their ranks on different hosts."
    for hosts in several[:1]:
        layouts = dict.fromkeys(arm["layout"] for arm in design["arms"])
        yield from filter(None, (slices_apart(parse_layout(layout), hosts) for layout in layouts))
        yield from _crossing_sentences(design, records)


def _crossing_sentences(design: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    """What the arms send from host to host, by the layouts' own figures."""
    for phase, what in (("prefill", "a prefill"), ("decode", "a decode step")):
        parts = []
        for arm in design["arms"]:
            rows = [r for r in of_kind(records, "traffic", arm["label"]) if r["phase"] == phase and r.get("crossings")]
            if rows and arm["role"] in ("baseline", "arm"):
                across, inside = (
                    sum(row[key] for row in rows[-1]["crossings"]) for key in ("across_bytes", "inside_bytes")
                )
                parts.append(f"{arm['label']} {across / 1e6:,.3g} of {(across + inside) / 1e6:,.3g} MB")
        if parts:
            yield f"Between hosts go in {what}, as rings in the order of ranks send equal parts: {', '.join(parts)}."


def warnings(design: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]) -> list[str]:
    """All of them, the gravest first."""
    warnings = [cpu_warning(design["ranks"])] if design["device"] == "cpu" else []
    warnings += _completeness_warnings(design, records, summary["complete"])
    warnings += _accuracy_warnings(summary)
    warnings += _identity_warnings(design, records)
    warnings += _host_warnings(design, records)
    warnings += _noise_warnings(design, summary)
    warnings += _replication_warnings(records, summary)
    return warnings
