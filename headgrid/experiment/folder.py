"""A run's folder on disk: made whole or not at all, read back, never rewritten in place."""

import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput
from headgrid.experiment.design import Design, from_dict
from headgrid.experiment.journal import Journal, read


def create(design: Design, environment: dict[str, Any], out: Path) -> Path:
    """Make the run folder with design and environment. Nothing is left half-written: the folder appears whole."""
    return create_at(out / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{design.name}", design, environment)


def create_at(folder: Path, design: Design, environment: dict[str, Any]) -> Path:
    """The same with the folder's own path. Raises InvalidInput where it cannot be written."""
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        write_json(building / "design.json", design.to_dict())
        write_json(building / "env.json", environment)
        Journal(building / "journal.jsonl").close()
        building.rename(folder)
    except OSError as error:
        raise InvalidInput(f"cannot write the run folder {folder}", why=str(error), legal=("--out FOLDER",)) from error
    return folder


def open_run(folder: Path) -> tuple[Design, list[dict[str, Any]]]:
    """The design and the records of an existing run. Raises InvalidInput if it is not one."""
    try:
        data = json.loads((folder / "design.json").read_text())
        design = from_dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        legal = ("a folder that `headgrid compare` made",)
        raise InvalidInput(f"{folder} is not a run folder", why=f"design.json: {error}", legal=legal) from error
    return design, read(folder / "journal.jsonl")


def runs(out: Path) -> Iterator[Path]:
    """Run folders under `out`, newest last."""
    yield from sorted(path.parent for path in out.glob("*/design.json"))


def write_json(path: Path, value: Any) -> None:
    """Write strict, readable JSON at once or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
