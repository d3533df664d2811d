"""Anyone's results as a value: the documented schema of docs/check.md, from JSON or CSV."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headgrid.errors import HeadgridError, InvalidInput
from headgrid.spec.hardware import Hardware, find_hardware
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload, dtype_name

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "tokens_per_s")
TIMES = ("tpot_s", "ttft_s", "communication_s")
MEMORY = ("parameters_bytes", "kv_cache_bytes", "activations_bytes", "communication_buffer_bytes")
BYTES = (*MEMORY, "memory_bytes", "total_memory_bytes")
SHARES = (
    "gpu_utilization", "sm_utilization", "tensor_utilization", "memory_bandwidth_utilization", "link_utilization",
    "mfu", "mbu", "scaling_efficiency", "overlap",
)  # fmt: skip
DEVICE_RATES = ("memory_bytes_per_s", "link_bytes_per_s", "flop_per_s")
METRICS = (*RATES, *TIMES, *BYTES, *SHARES, *DEVICE_RATES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A mean over `n` units with their SD and the 95 % interval of the mean; None where it was not stated."""

    mean: float
    sd: float | None = None
    ci95: tuple[float, float] | None = None
    n: int | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return (self.ci95[1] - self.ci95[0]) / 2 if self.ci95 else None

    @property
    def implied_sd(self) -> float | None:
        """The SD that was stated, or else the one that the interval and n imply."""
        if self.sd is not None or self.half is None or self.n is None or self.n < 2:
            return self.sd
        from scipy.special import stdtrit

        return self.half * math.sqrt(self.n) / float(stdtrit(self.n - 1, 0.975))


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """A collective's exposed time, once in each layer, step or micro_batch (`per`), and what a rank sends for it."""

    collective: str
    per: str
    time_s: float
    bytes_per_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """What is claimed of one layout on `devices` devices. Bytes are of one device, but for `total_memory_bytes`."""

    label: str
    devices: int
    figures: dict[str, Figure]
    communication: tuple[Communication, ...] = ()
    linears: str | None = None
    """Dtype of the products with weights, where it is not the workload's."""

    def mean(self, metric: str) -> float | None:
        """The mean of a figure, None if it is not stated."""
        return self.figures[metric].mean if metric in self.figures else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResult:
    """What is claimed of arm a against arm b. `ratio` is a's figure over b's; `unit` is what `n` and p count."""

    a: str
    b: str
    metric: str | None = None
    ratio: Figure | None = None
    p_value: float | None = None
    p_below: float | None = None
    cohens_d: float | None = None
    n: int | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A claim as a whole. Without hardware, model or workload the gates that need them do not run."""

    name: str
    hardware: Hardware | None
    model: ModelSpec | None
    workload: Workload | None
    arms: tuple[ArmResult, ...]
    comparisons: tuple[ComparisonResult, ...] = ()

    def arm(self, label: str) -> ArmResult:
        """The arm of this label."""
        return next(arm for arm in self.arms if arm.label == label)


def read_result(path: Path) -> Result:
    """The results in a .json or .csv file. Raises InvalidInput that names what the schema does not have."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"cannot read {path}", why=str(error), legal=("FILE.json", "FILE.csv", "a run folder")
        ) from error
    if path.suffix not in (".json", ".csv"):
        raise InvalidInput(f"{path} is neither .json nor .csv", legal=("FILE.json", "FILE.csv", "a run folder"))
    try:
        document = json.loads(text, parse_constant=_refuse) if path.suffix == ".json" else from_csv(text)
        return parse_result(document, path.name)
    except HeadgridError as error:
        why = "; ".join(part for part in (error.numbers, error.why) if part)
        raise InvalidInput(f"{path}: {error.what}", why=why, legal=error.legal) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"{path} is not a file of results", why=f"{type(error).__name__}: {error}", legal=("see docs/check.md",)
        ) from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no figure")


def parse_result(document: Mapping[str, Any], name: str) -> Result:
    """The value of a JSON document. Raises InvalidInput for unknown fields, so that none is overlooked by a typo."""
    _only(document, ("name", "hardware", "model", "workload", "arms", "comparisons"), "the file")
    hardware = document.get("hardware") or {}
    _only(hardware, ("device", "devices", "note"), "hardware")
    work = _workload(document.get("workload"))
    arms = tuple(_arm(row, hardware.get("devices")) for row in document["arms"])
    if not arms or len({arm.label for arm in arms}) != len(arms):
        raise InvalidInput("results need arms, each with a label of its own", numbers=f"{len(arms)} arms")
    return Result(
        name=str(document.get("name", name)),
        hardware=find_hardware(hardware["device"]) if hardware.get("device") else None,
        model=_model(document.get("model"), work),
        workload=work,
        arms=arms,
        comparisons=tuple(_comparison(row, [arm.label for arm in arms]) for row in document.get("comparisons", ())),
    )


def _only(row: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    if unknown := sorted(set(row) - set(known)):
        raise InvalidInput(f"{what} has {', '.join(unknown)}, which the schema does not have", legal=tuple(known))


def _workload(row: Mapping[str, Any] | None) -> Workload | None:
    if row is None:
        return None
    _only(row, ("batch", "seq", "decode_steps", "dtype"), "workload")
    dtype: Any = dtype_name(row.get("dtype", "float16"))
    return Workload(batch=row["batch"], seq=row["seq"], decode_steps=row.get("decode_steps", 1), dtype=dtype)


def _model(row: Any, work: Workload | None) -> ModelSpec | None:
    """A named model, or its sizes: what is not stated is chosen so that the bounds become weaker, never stronger."""
    if row is None or isinstance(row, str):
        return find_model(row) if row else None
    known = [field.name for field in fields(ModelSpec)]
    _only(row, known, "model")
    least: dict[str, Any] = {"name": "the model", "num_kv_heads": row["num_heads"], "vocab_size": 1}
    least["max_positions"] = work.cache_positions if work else 1
    return ModelSpec(**(least | dict(row)))


def _arm(row: Mapping[str, Any], devices: Any) -> ArmResult:
    _only(row, ("label", "layout", "devices", "linears", "metrics", "communication"), "an arm")
    count = row.get("devices", devices)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInput(f"{row['label']}: devices = {count!r} is not a positive whole number")
    _only(row["metrics"], METRICS, f"{row['label']}: metrics")
    calls = tuple(Communication(**each) for each in row.get("communication", ()))
    for call in calls:
        if call.per not in ("layer", "step", "micro_batch"):
            raise InvalidInput(f"communication per {call.per!r}", legal=("layer", "step", "micro_batch"))
    figures = {name: _figure(value, name) for name, value in row["metrics"].items()}
    label, linears = str(row["label"]), row.get("linears")
    return ArmResult(label=label, devices=count, figures=figures, communication=calls, linears=linears)


def _figure(value: Any, name: str) -> Figure:
    if not isinstance(value, Mapping):
        value = {"mean": value}
    _only(value, ("mean", "sd", "ci95", "n"), name)
    interval = value.get("ci95")
    numbers = [value["mean"], value.get("sd", 0.0), value.get("n", 1), *(interval or ())]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers):
        raise InvalidInput(f"{name} = {json.dumps(value)} has what is no number")
    pair = (float(interval[0]), float(interval[1])) if interval is not None else None
    return Figure(mean=float(value["mean"]), sd=value.get("sd"), ci95=pair, n=value.get("n"))


def _comparison(row: Mapping[str, Any], labels: list[str]) -> ComparisonResult:
    _only(row, [field.name for field in fields(ComparisonResult)], "a comparison")
    for key in ("a", "b"):
        if row[key] not in labels:
            raise InvalidInput(f"a comparison names arm {row[key]!r}", legal=tuple(labels))
    if row.get("metric") not in (None, *METRICS):
        raise InvalidInput(f"a comparison is of {row['metric']!r}", legal=METRICS)
    ratio = _figure(row["ratio"], "ratio") if row.get("ratio") is not None else None
    fields_of_row: dict[str, Any] = {**row, "ratio": ratio}
    return ComparisonResult(**fields_of_row)


COLUMNS = ("arm", "versus", "metric", "value", "sd", "ci95_low", "ci95_high", "n", "p_value", "cohens_d")


def from_csv(text: str) -> dict[str, Any]:
    """The JSON document of a CSV file: one figure a row.

    Rows without an arm are settings (`hardware.device`, `model.num_layers`, ...); rows with `versus` compare, and their
    value is the ratio of the arm's figure to the other's.
    """
    reader = csv.DictReader(io.StringIO(text))
    _only(dict.fromkeys(reader.fieldnames or ()), COLUMNS, "the CSV file's head")
    document: dict[str, Any] = {"hardware": {}, "comparisons": []}
    arms: dict[str, dict[str, Any]] = {}
    for row in reader:
        cells = {key: value.strip() for key, value in row.items() if value is not None and value.strip()}
        figure = {key: _number(cells[key]) for key in ("sd", "n") if key in cells}
        if "value" in cells:
            figure["mean"] = _number(cells["value"])
        if "ci95_low" in cells or "ci95_high" in cells:
            figure["ci95"] = [_number(cells["ci95_low"]), _number(cells["ci95_high"])]
        if "arm" not in cells:
            part, _, field = cells["metric"].partition(".")
            place = document.setdefault(part, {}) if field else document
            place[field or part] = _number(cells["value"])
        elif "versus" in cells:
            stated = {key: _number(cells[key]) for key in ("p_value", "cohens_d") if key in cells}
            pair = {"a": cells["arm"], "b": cells["versus"], "metric": cells.get("metric")}
            document["comparisons"].append(pair | stated | ({"ratio": figure} if "mean" in figure else {}))
        else:
            arms.setdefault(cells["arm"], {})[cells["metric"]] = figure
    return document | {"arms": [{"label": label, "metrics": metrics} for label, metrics in arms.items()]}


def _number(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
