"""A run folder as a check reads it: what is on disk, without the help of the code that wrote it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgrid.errors import HeadgridError, InvalidInput
from headgrid.experiment import telemetry
from headgrid.experiment.journal import Seal, read, seal
from headgrid.experiment.records import Record
from headgrid.experiment.telemetry import Telemetry
from headgrid.layout.layout import Layout, parse_layout
from headgrid.spec.model import ModelSpec, model_from
from headgrid.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Run:
    """The documents of a run. `model` and `workload` are None where this version cannot read those of the design.

    `same_version`: the run was made by the very source that checks it; only then must all predictions be equal.
    """

    folder: Path
    design: dict[str, Any]
    env: dict[str, Any]
    env_sha256: str
    records: list[Record]
    seal: Seal
    summary: dict[str, Any] | None
    telemetry: Telemetry | None
    model: ModelSpec | None
    workload: Workload | None
    same_version: bool

    @property
    def labels(self) -> list[str]:
        """Of the arms, in their order."""
        return [arm["label"] for arm in self.design["arms"]]

    @property
    def arms(self) -> Iterator[tuple[str, Layout]]:
        """Label and layout of every arm."""
        return ((arm["label"], parse_layout(arm["layout"])) for arm in self.design["arms"])

    def linears(self, label: str) -> str:
        """What the products of the arm of this label run in."""
        return next((layout.linears for each, layout in self.arms if each == label), "model")

    @property
    def chained(self) -> bool:
        """Whether a version wrote the journal that chains records, and writes what came with the chain."""
        return self.seal.unchained < self.seal.records


@dataclass(frozen=True, slots=True)
class Segment:
    """The records of one attempt at one launch, in order; `start` is its place in the journal."""

    launch: int
    attempt: int
    start: int
    records: tuple[Record, ...]

    def of(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def where(self) -> str:
        """In words."""
        return f"launch {self.launch}" + (f", attempt {self.attempt}" if self.attempt else "")


def segments(records: list[Record]) -> list[Segment]:
    """The journal cut before each launch record. Records before the first one are not in any."""
    starts = [place for place, record in enumerate(records) if record["kind"] == "launch"]
    found: list[Segment] = []
    for start, stop in zip(starts, [*starts[1:], len(records)], strict=True):
        index = records[start]["launch"]
        attempt = sum(segment.launch == index for segment in found)
        found.append(Segment(index, attempt, start, tuple(records[start:stop])))
    return found


def open_folder(folder: Path, source_sha256: str | None) -> Run:
    """Read everything. Raises InvalidInput if a document is missing or no JSON: then this is not a run folder."""
    design, env = (_document(folder, name) for name in ("design.json", "env.json"))
    try:
        records, sealed = read(folder / "journal.jsonl"), seal(folder / "journal.jsonl")
    except OSError as error:
        raise InvalidInput(f"{folder} is not a run folder", why=f"journal.jsonl: {error}") from error
    summary = _document(folder, "summary.json") if (folder / "summary.json").exists() else None
    return Run(
        folder,
        design,
        env,
        hashlib.sha256((folder / "env.json").read_bytes()).hexdigest(),
        list(records),
        sealed,
        summary,
        telemetry.read(folder / telemetry.FILE),
        _tried(model_from, design.get("model")),
        _tried(lambda fields: Workload(**fields), design.get("workload")),
        source_sha256 is not None and env.get("source_sha256") == source_sha256,
    )


def _document(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{folder} is not a run folder",
            why=f"{name}: {error}",
            legal=("a folder that `headgrid compare` made", "a FILE.json or FILE.csv of results"),
        ) from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{folder / name} is not a JSON object")
    return found


def _tried(make: Callable[[Any], Any], fields: Any) -> Any:
    """What is made of a document's fields; None where this version cannot."""
    try:
        return make(fields)
    except (HeadgridError, AttributeError, TypeError, ValueError):
        return None
