"""The end of a run: summary.json and report.html, from the journal alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headgrid.errors import InvalidInput
from headgrid.experiment.folder import open_run, write_json, write_text
from headgrid.experiment.journal import seal
from headgrid.experiment.machine import source_sha256
from headgrid.experiment.records import Record
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry import FILE, Telemetry, read
from headgrid.report.html import render


class Documents(NamedTuple):
    """What a page is made from, in the order in which `render` takes it."""

    design: dict[str, Any]
    env: dict[str, Any]
    records: Sequence[Record]
    summary: dict[str, Any]
    telemetry: Telemetry | None


def documents(folder: Path, run: str | None) -> Documents:
    """All that `folder` holds, its summary made again; `run` is what the summary calls the run.

    Raises InvalidInput if `folder` is not a run folder.
    """
    _, records = open_run(folder)
    declared = json.loads((folder / "design.json").read_text())  # of its own version, with the hash that ranks saw
    try:
        env = json.loads((folder / "env.json").read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{folder} is not a run folder", why=f"env.json: {error}") from error
    sealed = seal(folder / "journal.jsonl")
    journal = {"records": sealed.records, "link": sealed.link}
    telemetry = read(folder / FILE)
    made = summary_of(declared, records, telemetry, env) | {"run": run, "journal": journal}
    return Documents(declared, env, records, made, telemetry)


def conclude(folder: Path) -> dict[str, Any]:
    """Write both files and return the summary. Raises InvalidInput if `folder` is not a run folder."""
    found = documents(folder, str(folder))
    write_json(folder / "summary.json", found.summary)
    write_text(folder / "report.html", render(*found, source_sha256=source_sha256()))
    return found.summary
