"""An untouched run, made once."""

import os
import shutil
from pathlib import Path

import honest_run
import pytest


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "untouched"
    honest_run.write_run(folder)
    return folder


@pytest.fixture
def run(untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to tamper with. Forging writes a whole journal anew, and need not wait for the disk at each record."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Path(shutil.copytree(untouched, tmp_path / "run"))
