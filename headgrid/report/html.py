"""The report of a run: one HTML file that needs nothing else, no network, and to be read not even its own script."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from headgrid.errors import InvalidInput
from headgrid.experiment.cautions import cpu_warning
from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import Phase, Record
from headgrid.experiment.stats import PHASES
from headgrid.experiment.telemetry import Telemetry
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import stage_layers
from headgrid.report import (
    belief,
    breakdown,
    ceilings,
    conditions,
    costs,
    embed,
    pairs,
    partition,
    plots,
    resolving,
    tables,
    timeplots,
)
from headgrid.report import format as fmt
from headgrid.report.blocks import Block, blocks, listed
from headgrid.report.inert import inert
from headgrid.report.naming import caution, named, names
from headgrid.spec.model import ModelSpec

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its caption; without a drawing the caption says why there is none."""

    title: str
    drawing: Markup | None
    caption: str = ""
    wide: bool = False
    rows: tuple[tuple[str, ...], ...] = ()
    arms: tuple[int, ...] = ()
    """Numbers of the arms that it is about, if it is about some only."""


def render(
    design: Json,
    env: Json,
    records: Sequence[Record],
    summary: Json,
    telemetry: Telemetry | None = None,
    *,
    source_sha256: str | None = None,
) -> str:
    """The whole page. Pure: the same documents make the same page. Without `telemetry` no counters are drawn.

    Labels and names are text to be shown, whatever they contain; unknown values appear as "not measured".
    Ratios are throughputs of the first arm over the second, above 1 where the first is faster. `source_sha256`: of the
    source that makes the page, which the page then names, so that a check knows whether it can make the same.
    """
    design, env, records, summary = (inert(document) for document in (design, env, records, summary))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = lambda text: escape(text).replace("+", Markup("+<wbr>"))
    template = resources.files("headgrid.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    layouts = _layouts(design)
    raw = {arm["label"]: named(arm) for arm in summary["arms"] if arm["verified"]}
    summary = resolving.contestants(summary)
    numbers = {arm["label"]: number for number, arm in enumerate(summary["arms"])}
    labels = [arm["label"] for arm in summary["arms"] if arm["verified"]]
    timed = blocks({label: numbers[label] for label in labels}, records, summary)
    script, script_hash = embed.script()
    known = {text: parts for text, parts in layouts.items() if not isinstance(parts, str)}
    layers = {text: _layers_per_rank(*parts) for text, parts in known.items()}
    mean = {text: model.num_layers / layout.pp for text, (model, layout) in known.items()}
    return environment.from_string(template).render(
        title=_title(design),
        maker=source_sha256,
        script=script,
        script_hash=script_hash,
        data=embed.data(design, summary, records, timed),
        numbers={**{arm["label"]: len(numbers) for arm in design["arms"]}, **numbers},  # none hides the planted arm
        pair_head=pairs.HEAD,
        pair_note=pairs.NOTE,
        subtitle=_subtitle(design, summary),
        outcome=outcome(summary, design["margin"]),
        warnings=_warnings(design, env, summary),
        verdicts=belief.verdicts(summary),
        control=belief.control_line(summary),
        performance=tables.performance(summary),
        comparisons=[tables.comparisons(summary, phase, design["margin"]) for phase in PHASES],
        noise=belief.noise_line(summary),
        memory=costs.memory(summary),
        traffic=[
            *breakdown.tables(summary, mean),
            *filter(None, (costs.traffic(summary, phase, layers) for phase in PHASES)),
        ],
        ceilings=ceilings.table(summary),
        validation=belief.validation(summary, records),
        isolation=conditions.isolation(summary),
        telemetry=[conditions.telemetry(summary, phase) for phase in PHASES],
        figures=list(_figures(design, records, summary, timed)),
        over_time=_over_time(telemetry, records, {label: numbers[label] for label in labels}),
        partitions=list(_partitions(layouts)),
        facts=list(_facts(design, env, records)),
        raw=[tables.all_blocks(raw, records, phase) for phase in PHASES] if listed(timed) else [],
        many=len(timed),
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _title(design: Json) -> str:
    return f"{design['name']}: {design['model']['name']} on {design['ranks']} ranks"


def _subtitle(design: Json, summary: Json) -> str:
    work = design["workload"]
    parts = [
        f"{len(summary['arms'])} arms",
        f"batch {work['batch']:,}",
        f"sequence {work['seq']:,}",
        f"{work['decode_steps']:,} decode steps",
        work["dtype"],
        design["device"],
        design["created"],
        PurePath(summary["run"] or "").name,  # a page travels; where it was made is nobody else's
    ]
    return " · ".join(fmt.plain(part) for part in parts if part)


def outcome(summary: Json, margin: float) -> str:
    """One sentence: what a reader takes away who reads no further."""
    arms = summary["arms"]
    baseline = next(arm["label"] for arm in arms if arm["role"] == "baseline")
    twins = {arm["label"] for arm in arms if arm["role"] == "aa"}
    failed = [arm["label"] for arm in arms if not arm["verified"]]
    checked = (
        "every arm computes what the reference computes" if not failed else f"{', '.join(failed)} failed the check"
    )
    if not failed and any(arm.get("fp8") is not None for arm in arms):
        checked += ", with FP8 linears within a wider bound"
    if failed and not any(arm["verify"] for arm in arms):
        checked = "no arm has been checked against the reference"
    parts, called = [checked], names(summary)
    for phase in PHASES:
        rows = [row for row in summary["comparisons"] if row["phase"] == phase and row["b"] == baseline]
        parts.append(_phase_outcome([row for row in rows if row["a"] not in twins], phase, baseline, margin, called))
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _phase_outcome(rows: Sequence[Json], phase: Phase, baseline: str, margin: float, called: Mapping[str, str]) -> str:
    known = [row for row in rows if row["ratio"] is not None]
    if not known:
        return f"{phase} was not compared"
    if all(row["ci95"] is None for row in known):
        return f"{phase} was timed too seldom for a verdict"
    best = max(known, key=lambda row: row["ratio"])
    faster = [row for row in known if claimed(row) == "faster"]
    if faster:
        best = max(faster, key=lambda row: row["ratio"])
        gain = f"{_gain(best)} more tokens per second than {called[baseline]}{_within(best)}"
        return f"in {phase}, {called[best['a']]} handled {gain}{_without_fp8(best, faster, called)}"
    if all(claimed(row) == "slower" for row in known):
        closest = f"the closest, {called[best['a']]}, by {_gain(best)}"
        return f"in {phase}, every other layout was slower than {called[baseline]}, {closest}"
    if all(claimed(row) == "equivalent" for row in known):
        return f"in {phase}, all layouts were as fast as {baseline}, within {fmt.percent(margin)}"
    return f"in {phase}, no layout was shown to be faster than {baseline}"


def _without_fp8(best: Json, faster: Sequence[Json], called: Mapping[str, str]) -> str:
    """Beside a winner that is less exact: the fastest of those that are not."""
    as_exact = [row for row in faster if called[row["a"]] == row["a"]]
    if called[best["a"]] == best["a"]:
        return ""
    if not as_exact:
        return ", while none without FP8 was shown to be faster"
    second = max(as_exact, key=lambda row: row["ratio"])
    return f", and {second['a']}, the fastest without FP8, {_gain(second)} more"


def _gain(row: Json) -> str:
    return fmt.percent(abs(row["ratio"] - 1), 3)


def _within(row: Json) -> str:
    low, high = (fmt.percent(edge - 1, 3) for edge in row["ci95"])
    return f" (95 % interval {low} to {high})"


def _warnings(design: Json, env: Json, summary: Json) -> list[str]:
    """The summary's warnings; the one about CPUs with the number of cores, which only the environment knows."""
    general = cpu_warning(design["ranks"])
    cores = env.get("cpu_count")
    return [cpu_warning(design["ranks"], cores) if text == general else text for text in summary["warnings"]]


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(design: Json, records: Sequence[Record], summary: Json, timed: Sequence[Block]) -> Iterator[Figure]:
    arms, less_exact = summary["arms"], caution(summary)
    numbers = {arm["label"]: number for number, arm in enumerate(arms)}
    prefill = plots.bars("prefill", arms, "prefill_tokens_per_s", 1.0, "tokens per second")
    yield Figure("Prefill throughput", prefill, f"Higher is better.{less_exact}")
    tpot = plots.bars("tpot", arms, "decode_tpot_s", 1e3, "ms per token")
    yield Figure("Decode TPOT", tpot, f"Lower is better.{less_exact}")
    for phase in PHASES:
        rows = [row for row in summary["comparisons"] if row["phase"] == phase]
        drawing = plots.ratios(f"ratio-{phase}", rows, design["margin"], numbers)
        yield Figure(f"{phase.capitalize()} ratios", drawing, f"Right is faster.{less_exact}")
    for phase in PHASES:
        if (drawing := breakdown.bars(f"breakdown-{phase}", summary, phase, numbers)) is not None:
            told = "In a pass of its own; exposed: nothing computes meanwhile."
            yield Figure(f"Where a {phase} step's time goes", drawing, told)
    for phase in PHASES:
        drawing, told = timeplots.blocks_over_time(f"blocks-{phase}", list(numbers), timed, phase) or (None, "")
        title = f"{phase.capitalize()} blocks as they ran"
        yield Figure(title, drawing, told + less_exact, wide=timeplots.is_wide(timed))
    own = {arm["label"] for arm in design["arms"] if arm["role"] in ("aa", "planted")}
    passes = [record for record in records if record["kind"] == "pipeline" and record["arm"] not in own]
    yield from _timelines(passes, numbers)


def _over_time(telemetry: Telemetry | None, records: Sequence[Record], numbers: Mapping[str, int]) -> Figure | None:
    """What the counters said while arms took turns; None without samples."""
    drawn = timeplots.telemetry_over_time("telemetry", telemetry, records, numbers)
    return Figure("Telemetry over time", *drawn, wide=True) if drawn else None


def _timelines(records: Sequence[Record], numbers: Mapping[str, int]) -> Iterator[Figure]:
    """The first pipeline pass of every arm."""
    seen = set()
    for record in records:
        if record["arm"] in seen:
            continue
        seen.add(record["arm"])
        stages = 1 + max((event["stage"] for event in record["events"]), default=0)
        for phase in PHASES:
            events = [event for event in record["events"] if event["phase"] == phase]
            drawn = plots.timeline(f"pipeline-{len(seen)}-{phase}", events, stages)
            if drawn:
                arms = (numbers[record["arm"]],)
                yield Figure(f"Pipeline of {record['arm']}, {phase}", *drawn, wide=True, arms=arms)


def _layouts(design: Json) -> dict[str, tuple[ModelSpec, Layout] | str]:
    """Model and layout of each distinct layout text, or why it cannot be drawn."""
    found: dict[str, tuple[ModelSpec, Layout] | str] = {}
    for arm in design["arms"]:
        try:
            found[arm["layout"]] = ModelSpec(**design["model"]), parse_layout(arm["layout"])
        except (InvalidInput, ValueError, TypeError) as error:
            found[arm["layout"]] = str(error)
    return found


def _layers_per_rank(model: ModelSpec, layout: Layout) -> int:
    return max(len(layers) for layers in stage_layers(model, layout))


MAX_RANKS_LISTED = 128


def _partitions(layouts: Mapping[str, tuple[ModelSpec, Layout] | str]) -> Iterator[Figure]:
    for number, (text, parts) in enumerate(layouts.items()):
        if isinstance(parts, str):
            yield Figure(text, None, f"Not drawn: {parts}")
            continue
        model, layout = parts
        rows = tuple(partition.rows(model, layout)) if layout.ranks <= MAX_RANKS_LISTED else ()
        drawing = partition.draw(f"partition-{number}", model, layout)
        yield Figure(text, drawing, partition.caption(model, layout), rows=rows)


# --- what was run ----------------------------------------------------------------------------------------------------


def _facts(design: Json, env: Json, records: Sequence[Record]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    launches = [record for record in records if record["kind"] == "launch"]
    ends = [record for record in records if record["kind"] == "end"]
    keys = ("protocol", "launches", "blocks", "warmup_blocks", "margin", "seed", "verify_sequences", "control")
    own = {key: design.get(key) for key in ("device", "backend", "ranks", "headgrid_version", *keys)}
    own["launches started"] = len(launches)
    own["ended"] = bool(ends and ends[-1]["completed"])
    yield "Model", list(_flat(design["model"], unset=NOT_SET))
    text = design.get("text", {}).get("source")
    yield "Workload", list(_flat({**design["workload"], "text": text}, unset=NOT_SET))
    yield "Design", list(_flat(own, unset=NOT_SET))
    yield "Environment", list(_flat(env))
    hashes = {"design": design.get("hash"), "text": design.get("text", {}).get("sha256")}
    for key in ("input_sha256", "weights_sha256"):
        hashes[key.removesuffix("_sha256")] = ", ".join(_distinct(record.get(key) for record in launches)) or None
    yield "SHA-256", list(_flat(hashes))


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(fmt.plain(value) for value in values))


NOT_SET = "not set"


def _columns(value: Any) -> Any:
    """A list of rows as a row of lists; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return {column: [row.get(column) for row in value] for column in value[0]}
    return value


def _flat(document: Json, prefix: str = "", unset: str = fmt.NOT_MEASURED) -> Iterator[tuple[str, str]]:
    """The leaves of a JSON document with their paths. Of rows, as of GPUs, each column is a leaf."""
    for key, found in document.items():
        path, value = f"{prefix}{key}", _columns(found)
        listed = value if isinstance(value, list) else [found]
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path} · ", NOT_SET if key == "environment" else unset)
        elif key.endswith("_bytes") and value is not None:
            yield path.removesuffix("_bytes"), fmt.plain([fmt.size(each) for each in listed])
        else:
            yield path, fmt.plain(value, unset=unset)
