"""The figures that formulas of the ledger of claims may name: constants, sizes, predictions, and what journals give.

Everything measured is made again from a run's journal and telemetry, not read from its summary. What a quantity demands
(five launches, a code that was looked for, a time that is known) it must have: a figure that cannot be had is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from claim_predictions import Predictions

from headgrid.experiment import budget, isolation, journal, scale, stats, telemetry
from headgrid.experiment.breakdown.summary import summarise_breakdown
from headgrid.experiment.records import MIN_LAUNCHES
from headgrid.experiment.scale_stats import summarise_study
from headgrid.experiment.telemetry_summary import summarise_telemetry
from headgrid.layout.flops import model_flops
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.memory import parameters_bytes
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

Spec = Mapping[str, Any]
_WATCHED = ("role", "step", "collective", "sent")
"""Keys of quantities from a pass of its own beside the timed blocks."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, where it has one, and where it comes from; of a measured one the machine, and
    the contamination codes that make some of its blocks suspect or worse.
    """

    value: float
    ci95: tuple[float, float] | None = None
    source: str = ""
    machine: str = ""
    codes: tuple[str, ...] = ()


class Run:
    """A run folder's documents, and what its records and telemetry make of them."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = folder.name, folder
        self.records = journal.read(folder / "journal.jsonl")
        self.summary = cache(lambda: stats.summarise(self.document("design"), self.records))
        self.breakdown = cache(lambda: summarise_breakdown(self.document("design"), self.records))
        self.isolation = cache(lambda: isolation.judge(self.document("design"), self.records, self._sampled()))
        self.telemetry = cache(lambda: summarise_telemetry(self.document("design"), self.records, self._sampled()))
        self._sampled = cache(lambda: telemetry.read(folder / telemetry.FILE))

    def document(self, name: str) -> dict[str, Any]:
        return json.loads((self._folder / f"{name}.json").read_text())

    @property
    def machine(self) -> str:
        return machine_of(self.document("env"))

    def arm(self, label: str) -> dict[str, Any]:
        return _only(self.summary()["arms"], label=label)

    def codes(self, spec: Spec) -> tuple[str, ...]:
        """What isolation has against the timed blocks that a quantity comes from; what it watched apart has none."""
        if any(key in spec for key in _WATCHED):
            return ()
        arms = {spec[key] for key in ("arm", "over") if key in spec}
        asked = spec.get("phase", spec.get("variation", spec.get("figure", "").partition("_")[0]))
        rows = (row for row in self.isolation()["figures"] if row["arm"] in arms and row["phase"] == asked)
        return tuple(sorted({code for row in rows for code in row["codes"]}))


def machine_of(environment: Mapping[str, Any]) -> str:
    """Such as `4 H200`."""
    names = [gpu["name"].removeprefix("NVIDIA ") for gpu in environment["gpus"]]
    return " and ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _only(rows: Any, **wanted: Any) -> dict[str, Any]:
    """The one row with these fields. Raises LookupError for none and for several."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {wanted}")
    return found[0]


def at(value: Any, path: str) -> Any:
    """The field at a dotted path; `#` is the length of a list."""
    for part in path.split("."):
        value = len(value) if part == "#" else value[int(part)] if part.isdigit() else value[part]
    return value


class Quantities(Mapping[str, Figure]):
    """The figures that formulas may name, looked up when they are asked for. Raises KeyError for any other."""

    def __init__(self, claims: Mapping[str, Any], runs: Path) -> None:
        self._specs, self._runs = claims["quantities"], runs
        self.model, self.workload = find_model(claims["model"]), Workload(**claims["workload"])
        self.run = cache(lambda name: Run(runs / name))
        self._predictions = cache(lambda run: Predictions(self.model, runs / run / "calibration.json"))
        self._figure = cache(self._find)

    def __getitem__(self, name: str) -> Figure:
        return self._figure(name)

    def __contains__(self, name: object) -> bool:
        return name in self._specs  # without looking it up

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _find(self, name: str) -> Figure:
        spec = self._specs[name]
        for key, make in self._kinds().items():
            if key in spec:
                return make(spec)
        return Figure(spec["value"], None, spec["source"])

    def _kinds(self) -> dict[str, Callable[[Spec], Figure]]:
        """What makes a quantity that has this key; the first that it has counts."""
        return {
            "study": self._scaled,
            "run": self._measured,
            "predict": self._predicted,
            "layout": self._memory,
            "model": lambda spec: Figure(
                self._of_model(spec["model"]), None, f"model `{self.model.name}`: {spec['model']}"
            ),
            "workload": lambda spec: Figure(
                getattr(self.workload, spec["workload"]), None, "the seed experiment's workload"
            ),
        }

    def _of_model(self, name: str) -> float:
        if name == "parameters":
            return parameters_bytes(self.model, Layout(), 0, 1)
        if name == "flops_per_token":  # causal attention counted half
            return model_flops(self.model, self.workload) / (self.workload.batch * self.workload.seq)
        return getattr(self.model, name)

    def _memory(self, spec: Spec) -> Figure:
        found = budget.worst(self.model, parse_layout(spec["layout"]), self.workload)
        return Figure(
            getattr(found, spec["figure"]),
            None,
            f"predicted: `{spec['layout']}`, {spec['figure']} of the fullest rank",
        )

    def _predicted(self, spec: Spec) -> Figure:
        layout, batch = spec["layout"], spec.get("batch", self.workload.batch)
        found = self._predictions(spec["calibration"])
        value, how = found.find(
            parse_layout(layout), replace(self.workload, batch=batch), spec["predict"], spec["part"]
        )
        return Figure(value, None, f"predicted: `{layout}`, batch {batch}, {spec['predict']}: {how}")

    def _scaled(self, spec: Spec) -> Figure:
        """An efficiency of a study of scaling."""
        study, runs = scale.open_study(self._runs / spec["study"])
        rows = summarise_study(study, runs)["rows"]
        row = _only(rows, family=spec["family"], mode=spec["mode"], ranks=spec["ranks"])
        found = row[spec["phase"]]
        where = f"{spec['study']}: `{row['layout']}`, batch {row['batch']}, {spec['phase']}, {spec['mode']} efficiency"
        environment = json.loads((self._runs / spec["study"] / row["run"] / "env.json").read_text())
        ci95 = found["efficiency_ci95"] and tuple(found["efficiency_ci95"])
        return Figure(found["efficiency"], ci95, where, machine_of(environment))

    def _measured(self, spec: Spec) -> Figure:
        run = self.run(spec["run"])
        kinds: dict[str, Callable[[Run, Spec], Figure]] = {
            "distinct": _distinct,
            "environment": _environment,
            "code": _contaminated,
            "counter": _sampled,
            "role": _broken_down,
            "step": _step,
            "variation": _varied,
            "over": _compared,
        }
        make = next((make for key, make in kinds.items() if key in spec), _of_arm)
        figure = make(run, spec)
        return replace(figure, source=f"{run.name}: {figure.source}", machine=run.machine, codes=run.codes(spec))


def _distinct(run: Run, spec: Spec) -> Figure:
    found = {record[spec["distinct"]] for record in run.records if record["kind"] == "launch"}
    return Figure(len(found), None, f"distinct {spec['distinct']}")


def _environment(run: Run, spec: Spec) -> Figure:
    return Figure(sum(gpu[spec["environment"]] for gpu in run.document("env")["gpus"]), None, spec["environment"])


def _contaminated(run: Run, spec: Spec) -> Figure:
    """Timed blocks that a contamination code concerns. Raises ValueError if it was not looked for all along."""
    found, code = run.isolation(), spec["code"]
    if code not in found["checked"]:
        raise ValueError(f"{run.name}: {code} was not checked")
    blocks = sum(row["blocks"] for row in found["findings"] if row["code"] == code)
    every = sum(found["blocks"].values())
    return Figure(blocks, None, f"timed blocks of {every} with {code}, from samples during the whole run")


def _sampled(run: Run, spec: Spec) -> Figure:
    """A counter's mean over the samples inside an arm's timed blocks."""
    arms = (run.telemetry() or {"arms": []})["arms"]
    row = _only(_only(arms, label=spec["arm"])["phases"][spec["phase"]], counter=spec["counter"])
    value = row[spec.get("figure", "mean")]
    spread = f" +- {row['sd']:.3g} (SD)" if row["sd"] is not None else ""
    return Figure(
        value,
        None,
        f"`{spec['arm']}`, {spec['phase']}, telemetry: {row['label']}, {spec.get('figure', 'mean')} of {row['n']}"
        f" samples{spread}",
    )


def _broken_down(run: Run, spec: Spec) -> Figure:
    """A figure of one step's calls of one role. Raises ValueError if it is not known."""
    step = _only(run.breakdown(), label=spec["arm"], phase=spec["phase"])
    wanted = {key: spec[key] for key in ("role", "collective") if key in spec}
    return _of_step(run, spec, _only(step["calls"], **wanted), spec["part"], f"{', '.join(wanted.values())}: ")


def _step(run: Run, spec: Spec) -> Figure:
    """A part of one step, mean over ranks. Raises ValueError if it is not known."""
    step = _only(run.breakdown(), label=spec["arm"], phase=spec["phase"])
    return _of_step(run, spec, step, spec["step"], "")


def _of_step(run: Run, spec: Spec, row: Mapping[str, Any], part: str, of: str) -> Figure:
    if row[part] is None:
        raise ValueError(f"{run.name}: {of}{part} of {spec['arm']} is not known")
    return Figure(row[part], None, f"`{spec['arm']}`, {spec['phase']}, breakdown: {of}{part} of a step")


def _varied(run: Run, spec: Spec) -> Figure:
    """SD over mean of the launches' mean times. Raises ValueError for fewer launches than may be called repeated."""
    row = _only(run.summary()["reproducibility"], label=spec["arm"])
    if row["launches"] < MIN_LAUNCHES:
        raise ValueError(f"{run.name} has {row['launches']} launches, not {MIN_LAUNCHES}")
    where = f"`{spec['arm']}`, {spec['variation']}: SD / mean of the times of {row['launches']} launches"
    return Figure(row[spec["variation"]], None, where)


def _compared(run: Run, spec: Spec) -> Figure:
    row = _only(run.summary()["comparisons"], a=spec["arm"], b=spec["over"], phase=spec["phase"])
    where = f"`{spec['arm']}` / `{spec['over']}`, {spec['phase']}"
    if "figure" in spec:
        return Figure(at(row, spec["figure"]), None, f"{where}, {spec['figure']}")
    return Figure(row["ratio"], tuple(row["ci95"]), f"{where}, throughput ratio{_over_launches(spec, row)}")


def _over_launches(spec: Spec, figure: Mapping[str, Any]) -> str:
    """How many launches an interval is over, for a quantity that is to be about launches.

    Raises ValueError if the interval is over blocks.
    """
    if not spec.get("launches"):
        return ""
    if figure["unit"] != stats.UNIT_LAUNCH:
        raise ValueError(f"an interval over {figure['n']} x {figure['unit']} is not over launches")
    return f", interval over {figure['n']} launches"


def _of_arm(run: Run, spec: Spec) -> Figure:
    arm, where = run.arm(spec["arm"]), f"`{spec['arm']}`"
    if "phase" in spec:
        return _traffic(arm, spec, where)
    value, where = at(arm, spec["figure"]), f"{where}, {spec['figure']}"
    if isinstance(value, dict):
        return Figure(value["mean"], tuple(value["ci95"]), where + _over_launches(spec, value))
    return Figure(value, None, where)


def _traffic(arm: Mapping[str, Any], spec: Spec, where: str) -> Figure:
    """A figure of one collective of a phase, or the bytes that all of some kinds have to send."""
    ops = [op for op in arm["traffic"] if op["phase"] == spec["phase"]]
    if "sent" in spec:
        total = sum(op["bytes_per_rank"] for op in ops if op["collective"] in spec["sent"])
        return Figure(total, None, f"{where}, {spec['phase']}: bytes that a rank sends")
    op = next(op for op in ops if (op["collective"], op["axis"]) == (spec["collective"], spec["axis"]))
    source = f"{where}, {spec['phase']}: {spec['collective']} over {spec['axis']}, {spec['figure']}"
    return Figure(op[spec["figure"]], None, source)
