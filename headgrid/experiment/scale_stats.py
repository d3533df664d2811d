"""What the runs of a study of scaling support: speed-ups and efficiencies with intervals, and memory per parameter.

With r = time on the fewest ranks W0 / time on W ranks and w = batch on W / batch on W0, the speed-up (ratio of
throughputs) is r x w and the efficiency r x w x W0 / W. That is T(W0) W0 / (T(W) W) where the batch is kept (strong
scaling) and T(W0) / T(W) where it grows with the ranks (weak scaling).

Launches of the same round are compared, block by block; the interval is over rounds from MIN_LAUNCHES on, else over
blocks, and then says nothing about another launch (`stats.estimate`). No torch in here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headgrid.experiment import stats
from headgrid.experiment.cautions import cpu_warning
from headgrid.experiment.design import Design
from headgrid.experiment.records import MIN_LAUNCHES, Phase, Record, block_times, is_verified, of_kind
from headgrid.experiment.scale import Point, Study
from headgrid.layout.layout import Layout
from headgrid.layout.memory import parameters_bytes

LEAST_SIZES = 4
"""Of fewer sizes nobody should say that anything scales linearly."""
_HELD = ("parameters_bytes", "kv_cache_bytes", "activations_peak_bytes")
"""Communication buffers are a part of the activations' peak."""

Run = tuple[Design, Sequence[Record]]
"""Design and records of a point."""


def summarise_study(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """The study's summary.json: a pure function of the study and its points' designs and records.

    `rows` has one entry for each family, mode and number of ranks, the fewest first. Times of layouts that were not
    verified are withheld, and so are ratios with them.
    """
    summaries = [stats.summarise(design.to_dict(), records) for design, records in runs]
    rows = [
        row
        for number, family in enumerate(study.families)
        for mode in dict.fromkeys(mode for point in study.points for mode in point.modes)
        for row in _family(family, number, mode, study.points, runs, summaries)
    ]
    controls = [s["negative_control_rejected"] for s, (d, _) in zip(summaries, runs, strict=True) if d.control]
    summary = {
        "schema": 1,
        "run": None,
        "device": runs[0][0].device,
        "model": runs[0][0].model.name,
        "rows": rows,
        "aa": [_null(point, summary) for point, summary in zip(study.points, summaries, strict=True)],
        "negative_control_rejected": bool(controls) and all(found is True for found in controls),
        "complete": all(summary["complete"] for summary in summaries),
    }
    return summary | {"warnings": list(_warnings(summary, study, runs))}


def _family(
    family: str,
    number: int,
    mode: str,
    points: Sequence[Point],
    runs: Sequence[Run],
    summaries: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The rows of one family in one mode; the first that it has is what the others are compared with."""
    base: tuple[str, Run] | None = None
    for point, run, summary in zip(points, runs, summaries, strict=True):
        layout = point.layouts[number]
        if layout is None or mode not in point.modes:
            continue
        base = base or (layout, run)
        arm = next(arm for arm in summary["arms"] if arm["layout"] == layout and arm["role"] != "aa")
        yield {
            "family": family,
            "mode": mode,
            "ranks": point.ranks,
            "run": point.run,
            "layout": layout,
            "batch": run[0].workload.batch,
            "verified": arm["verified"],
            "relative_error": arm["relative_error"],
            **{key: arm[key] for key in ("prefill_tokens_per_s", "decode_tpot_s", "decode_tokens_per_s")},
            **{phase: _scaled(base, (layout, run), phase) for phase in stats.PHASES},
            "memory": _memory(run, layout),
        }


def _scaled(base: tuple[str, Run], this: tuple[str, Run], phase: Phase) -> dict[str, Any]:
    """Speed-up and efficiency of a phase against the fewest ranks; 1 there by definition, None where not measured."""
    (base_design, _), (design, _) = base[1], this[1]
    work = design.workload.batch / base_design.workload.batch
    share = work * base_design.ranks / design.ranks
    if this == base:
        found = {"speedup": 1.0, "efficiency": 1.0} if _times(*base, phase) else {"speedup": None, "efficiency": None}
        return found | {"speedup_ci95": None, "efficiency_ci95": None, "unit": None, "n": 0}
    ratio = stats.throughput_ratio(_times(*this, phase), _times(*base, phase), this[1][0].protocol.analysis)
    low_high = ratio and ratio.ci95
    return {
        "speedup": ratio and ratio.mean * work,
        "speedup_ci95": low_high and [x * work for x in low_high],
        "efficiency": ratio and ratio.mean * share,
        "efficiency_ci95": low_high and [x * share for x in low_high],
        "unit": ratio and ratio.unit,
        "n": ratio.n if ratio else 0,
    }


def _times(layout: str, run: Run, phase: Phase) -> Mapping[Any, float]:
    return block_times(run[1], layout, phase) if is_verified(run[1], layout) else {}


def _memory(run: Run, layout: str) -> dict[str, Any] | None:
    """Measured bytes of the fullest rank and of all ranks, and the latter for each parameter of the model.

    Weights in 16 bits that are stored once have 2 `parameters_bytes` a parameter over all ranks; replicas have more.
    """
    design, records = run
    last = next(reversed(list(of_kind(records, "memory", layout))), None)
    if last is None or any(rank[key] is None for rank in last["per_rank"] for key in _HELD):
        return None
    count = parameters_bytes(design.model, Layout(), 0, 1)
    every = {key: [rank[key] for rank in last["per_rank"]] for key in _HELD}
    every["total_bytes"] = [sum(parts) for parts in zip(*every.values(), strict=True)]
    return {
        "num_parameters": count,
        "fullest_rank": {key: max(values) for key, values in every.items()},
        "all_ranks": {key: sum(values) for key, values in every.items()},
        "per_parameter": {key: sum(values) / count for key, values in every.items()},
    }


def _null(point: Point, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The point's two copies of one layout against each other, in each phase: what differs there is noise."""
    twin = next(arm["label"] for arm in summary["arms"] if arm["role"] == "aa")
    found = {row["phase"]: row for row in summary["comparisons"] if row["a"] == twin}
    return {"run": point.run} | {phase: {k: found[phase][k] for k in ("ratio", "ci95")} for phase in stats.PHASES}


def _warnings(summary: Mapping[str, Any], study: Study, runs: Sequence[Run]) -> Iterator[str]:
    """What a reader must know before quoting an efficiency."""
    if summary["device"] == "cpu":
        yield cpu_warning(max(point.ranks for point in study.points))
    if not summary["complete"]:
        yield "The study is incomplete: what is missing has no figures, and intervals are of what there is."
    if not summary["negative_control_rejected"]:
        yield "No negative control was rejected, so no verdict on accuracy in this study can be trusted."
    for row in summary["rows"]:
        if not row["verified"]:
            yield f"{row['layout']} is not verified in {row['run']}; its times are withheld."
    for point, (design, records) in zip(study.points, runs, strict=True):
        if any(record["design_hash"] != design.to_dict()["hash"] for record in of_kind(records, "launch")):
            yield f"{point.run}: a launch ran another design than the one in this folder."
    if len({r["weights_sha256"] for _, records in runs for r in of_kind(records, "launch")}) > 1:
        yield "The points had different weights."
    if (rounds := len(study.order)) < MIN_LAUNCHES:
        yield (
            f"With {rounds} of the {MIN_LAUNCHES} rounds that are needed, an interval describes only these launches;"
            " how much launches of the same point differ is not in it."
        )
    if len({point.ranks for point in study.points}) < LEAST_SIZES:
        yield f"Fewer than {LEAST_SIZES} sizes show no law: do not call this linear, or extend it to more ranks."
