"""The end of a run: summary.json and report.html, from the journal alone."""

import json
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput
from headgrid.experiment.folder import open_run, write_json, write_text
from headgrid.experiment.journal import seal
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry import FILE, read
from headgrid.report.html import render


def conclude(folder: Path) -> dict[str, Any]:
    """Write both files and return the summary. Raises InvalidInput if `folder` is not a run folder."""
    _, records = open_run(folder)
    declared = json.loads((folder / "design.json").read_text())  # of its own version, with the hash that ranks saw
    try:
        env = json.loads((folder / "env.json").read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{folder} is not a run folder", why=f"env.json: {error}") from error
    sealed = seal(folder / "journal.jsonl")
    journal = {"records": sealed.records, "link": sealed.link}
    made = summary_of(declared, records, read(folder / FILE))
    summary = made | {"run": str(folder), "journal": journal}
    write_json(folder / "summary.json", summary)
    write_text(folder / "report.html", render(declared, env, records, summary))
    return summary
