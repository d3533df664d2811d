"""What a new user meets first: help where nothing was asked for, and refusals that say what would be right."""

import sys
from pathlib import Path

import pytest

from headgrid.cli import main
from headgrid.runtime import launch


def said(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple:
    """Exit code, standard output and error of `headgrid` with these arguments, which may start no process."""
    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(sys, "argv", ["headgrid", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    return (ended.value.code, *capsys.readouterr())


def test_without_a_command_help_is_all_that_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said((), monkeypatch, capsys)
    assert (code, err) == (64, "") and "compare" in out and "layouts" in out
    code, out, err = said(("chek",), monkeypatch, capsys)
    assert (code, out) == (64, "") and err.startswith("error: ") and "check" in err


def test_help_loses_no_word_to_the_mark_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "runs/calibration-TIME.json" in said(("calibrate", "--help"), monkeypatch, capsys)[1]


@pytest.mark.parametrize(
    ("args", "right"),
    [
        (("generate", "--model", "nowhere", "--ids", "1"), "the folder with config.json"),
        (("report", "nowhere"), "a folder that `headgrid compare` made"),
        (("compare", "--device", "cpu", "--ranks", "99991"), "n divides its 32 KV heads"),
    ],
)
def test_a_refusal_says_what_would_be_right(
    args: tuple[str, ...],
    right: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = said(args, monkeypatch, capsys)
    assert code == 64 and err.startswith("error: ") and right in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
