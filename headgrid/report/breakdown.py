"""Where a step's time goes: tables of its parts and of each arm's collectives, and the parts as bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from headgrid.experiment.breakdown.summary import CLOSED, PARTS
from headgrid.experiment.records import Phase
from headgrid.experiment.stats import PHASES
from headgrid.report import format as fmt
from headgrid.report import plots
from headgrid.report.naming import names
from headgrid.report.table import NOT_APPLICABLE, Cell, Table, yes_or_no

Summary = Mapping[str, Any]
NAMES = ("compute", "exposed communication", "idle")
"""Of `PARTS`."""


def tables(summary: Summary, layers: Mapping[str, float]) -> list[Table]:
    """The parts of every arm's step, and for each phase its collectives; none of a run that was not watched.
    `layers` = layers on a rank of each layout, the mean of its stages, as bytes are means of ranks.
    """
    rows = summary.get("breakdown")
    if not rows:
        return []
    arms = {arm["label"]: arm for arm in summary["arms"]}
    called, on_rank = names(summary), {label: layers.get(arm["layout"]) for label, arm in arms.items()}
    found = [_parts(rows, called)]
    for phase in PHASES:
        counted = {label: _as_predicted(arm["traffic"], phase) for label, arm in arms.items()}
        found.append(_calls([row for row in rows if row["phase"] == phase], phase, called, on_rank, counted))
    return found


Counted = dict[tuple[str, str], bool]


def _as_predicted(ops: Sequence[Mapping[str, Any]], phase: Phase) -> Counted:
    """Of each collective and axis, whether all that was counted in the untimed pass is what the layout predicts."""
    found: Counted = {}
    for op in (op for op in ops if op["phase"] == phase):
        key = op["collective"], op["axis"]
        found[key] = found.get(key, True) and op["as_predicted"] is True
    return found


def _number(text: str, css: str = "number") -> Cell:
    return Cell(text, f"{css} unknown" if text == fmt.NOT_MEASURED else css)


def _parts(rows: Sequence[Mapping[str, Any]], called: Mapping[str, str]) -> Table:
    head = (
        "Method",
        "Phase",
        "Step, watched",
        "Compute",
        "Exposed communication",
        "Idle",
        "Hidden communication",
        "Parts miss step by",
        "Watched / timed",
    )
    found: list[list[Cell]] = []
    labels = [row["label"] for row in rows]
    for place, row in enumerate(rows):
        of_arm = [Cell(called[row["label"]], "name", labels.count(row["label"]), (row["label"],))]
        parts = [_number(_with_share(row[part], row["mean_step_s"])) for part in (*PARTS, "hidden_s")]
        missed = fmt.change(row["closure"])
        open_ = row["closure"] is not None and abs(row["closure"]) > CLOSED
        found.append(
            [
                *(of_arm if row["label"] not in labels[:place] else []),
                Cell(row["phase"]),
                _number(fmt.duration(row["step_s"])),
                *parts,
                _number(missed, "number bad" if open_ else "number"),
                _number(fmt.fixed(row["slow_down"], 3)),
            ]
        )
    return Table("Where a step's time goes", head, found, _parts_note(rows))


def _with_share(seconds: float | None, step_s: float) -> str:
    return f"{fmt.duration(seconds)} ({fmt.percent(seconds / step_s)})" if seconds is not None else fmt.NOT_MEASURED


def _parts_note(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = max(row["steps"] for row in rows)
    note = (
        f"From a pass of its own behind the timed blocks: one prefill, and the mean of {steps} decode steps."
        " Step: the slowest rank's; parts: means over ranks, with their share. Compute: something computes. Exposed:"
        " something communicates, waiting for other ranks included, and nothing computes. Idle is measured, never what"
        " is left. Parts miss step by: the worst rank's sum of parts over its step, which another clock took. Watched /"
        f" timed: what watching cost. Measured with {'; '.join(sorted({row['source'] for row in rows}))}."
    )
    cut = sorted({f"{row['label']} in {row['phase']}: {row['trace_cut']}" for row in rows if row["trace_cut"]})
    files = " Traces are in the run's folder `traces`; ui.perfetto.dev and chrome://tracing open them."
    opens = files if any(row["trace"] for row in rows) else ""
    return note + opens + (f" Of long ones only a part is kept: {'; '.join(cut)}." if cut else "") + _why(rows)


def _why(rows: Sequence[Mapping[str, Any]]) -> str:
    """Reasons of what is missing."""
    reasons = [row[key] for row in rows for key in ("unknown", "unmatched") if row[key]]
    return f" Not measured: {'; '.join(dict.fromkeys(reasons))}." if reasons else ""


def _calls(
    rows: Sequence[Mapping[str, Any]],
    phase: Phase,
    called: Mapping[str, str],
    on_rank: Mapping[str, float | None],
    counted: Mapping[str, Counted],
) -> Table:
    head = (
        "Method",
        "What for",
        "Collective",
        "Axis",
        "Calls",
        "Bytes per rank",
        "Time",
        "of it waiting",
        "Transfer",
        "Bus bandwidth",
        "Exposed",
        "Hidden",
        "Exposed per layer: median",
        "slowest",
        "Bytes per layer",
        "As predicted",
    )
    found: list[list[Cell]] = []
    for row in rows:
        listed = [_call(call, on_rank[row["label"]], counted[row["label"]]) for call in row["calls"]]
        listed = listed or [_none_issued(len(head) - 1)]
        found += [
            [*([Cell(called[row["label"]], "name", len(listed), (row["label"],))] if not place else []), *cells]
            for place, cells in enumerate(listed)
        ]
    whole = "one prefill of the whole batch" if phase == "prefill" else "one decode step"
    note = (
        f"Means over the ranks that issue such calls, of {whole}. As predicted: every rank's calls and bytes are those"
        " of the layout, to the byte, counted in another untimed pass. Transfer: the shortest of the ranks' times of a"
        " call, which is that of the rank that waited for nobody; what others took longer is waiting. Bus bandwidth as"
        " nccl-tests define it: the bytes a rank must send over the transfer's time, which for a kernel that sums and"
        " norms in one includes the norm. On a CPU, of what travels while a rank computes only the waiting for it is"
        " known."
    )
    return Table(f"Communication breakdown: {phase}", head, found, note)


def _call(call: Mapping[str, Any], on_rank: float | None, counted: Counted) -> list[Cell]:
    rate, layers = call["bus_bytes_per_s"], (call["layers"] or {}).get("exposed_s")
    per_layer = [NOT_APPLICABLE] * 2
    if layers:
        per_layer = [fmt.duration(layers["median"]), f"{fmt.duration(layers['max'])} (layer {layers['max_layer']})"]
    each = fmt.size(call["bytes"] / on_rank) if layers and on_rank else NOT_APPLICABLE
    texts = [f"{call['calls']:,.10g}", fmt.size(call["bytes"])]
    texts += [fmt.duration(call[key]) for key in ("time_s", "wait_s", "transfer_s")]
    texts += [f"{fmt.size(rate)}/s" if rate else fmt.NOT_MEASURED]
    texts += [fmt.duration(call[key]) for key in ("exposed_s", "hidden_s")]
    kind, axis = call["collective"], call["axis"]
    numbers = map(_number, [*texts, *per_layer, each])
    return [Cell(call["role"]), Cell(kind), Cell(axis), *numbers, yes_or_no(counted.get((kind, axis)))]


def _none_issued(columns: int) -> list[Cell]:
    """A row of dashes: words, numbers, and whether they were predicted."""
    dash = Cell(NOT_APPLICABLE)
    return [Cell("none issued"), dash, dash, *[_number(NOT_APPLICABLE)] * (columns - 4), dash]


def bars(name: str, summary: Summary, phase: Phase, numbers: Mapping[str, int]) -> Markup | None:
    """Each arm's step as a bar: compute, exposed communication and idle side by side; None where none is known.
    `numbers` of the arms by their labels.
    """
    rows = [row for row in summary.get("breakdown") or [] if row["phase"] == phase]
    known = {row["label"]: [row[part] for part in PARTS] for row in rows if None not in [row[part] for part in PARTS]}
    return plots.stacked(name, known, NAMES, "ms of a step, mean over ranks", 1e3, numbers)
