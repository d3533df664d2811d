"""The journal: what was appended is what is read, and a killed run costs at most the record being written."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from headgrid.experiment.journal import Journal, JournalError, read

FIRST = {"kind": "launch", "launch": 0, "time_s": 1.5}
SECOND = {"kind": "block", "arm": "n4m4:batch \u2713\n", "prefill_s": [0.1, 0.25], "warmup": False, "reason": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def written(path: Path, *records: dict) -> bytes:
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_reads_back_what_was_appended(path: Path) -> None:
    content = written(path, FIRST, SECOND)
    assert read(path) == [FIRST, SECOND]
    assert content.count(b"\n") == 2, "one line a record, whatever the record's text holds"


def test_reopening_appends(path: Path) -> None:
    written(path, FIRST)
    written(path, SECOND)
    assert read(path) == [FIRST, SECOND]


def test_empty_journal(path: Path) -> None:
    Journal(path).close()
    assert read(path) == []


def test_a_tail_torn_at_any_byte_is_ignored_by_read_and_repaired_by_open(path: Path) -> None:
    whole = written(path, FIRST, SECOND)
    first_line = whole.index(b"\n") + 1
    for length in range(first_line, len(whole)):
        path.write_bytes(whole[:length])
        assert read(path) == [FIRST], f"read, torn at byte {length}"
        assert path.stat().st_size == length, "reading changes nothing"
        Journal(path).close()
        assert path.read_bytes() == whole[:first_line], f"open, torn at byte {length}"
        written(path, SECOND)
        assert path.read_bytes() == whole, f"append after a repair at byte {length}"


@pytest.mark.parametrize("rubbish", [b"\0" * 40, b'{"kind": "bl\xff', b"[1, 2]", b'{"x": NaN}', b""])
def test_an_unparsable_last_line_with_its_newline_is_torn_too(path: Path, rubbish: bytes) -> None:
    intact = written(path, FIRST)
    path.write_bytes(intact + rubbish + b"\n")
    assert read(path) == [FIRST]
    Journal(path).close()
    assert path.read_bytes() == intact


@pytest.mark.parametrize("tail", [b'{"kind": "end"}\n', b'{"kind": "e'])
def test_damage_before_the_last_line_names_file_and_line(path: Path, tail: bytes) -> None:
    damaged = written(path, FIRST) + b'{"kind": "blo\n' + tail
    path.write_bytes(damaged)
    for use in (read, Journal):
        with pytest.raises(JournalError, match=r"journal\.jsonl, line 2"):
            use(path)
    assert path.read_bytes() == damaged, "a damaged journal is evidence and is left alone"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_json_lacks(path: Path, value: float) -> None:
    with Journal(path) as journal:
        journal.append(FIRST)
        with pytest.raises(ValueError):
            journal.append({"prefill_s": [0.1, value]})
        journal.append(SECOND)
    assert read(path) == [FIRST, SECOND]


def test_refuses_what_is_not_an_object(path: Path) -> None:
    with Journal(path) as journal, pytest.raises(TypeError):
        journal.append([1, 2])  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b""


def test_a_failed_write_leaves_no_partial_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        journal.append(FIRST)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError):
                journal.append(SECOND)
        journal.append(SECOND)
    assert read(path) == [FIRST, SECOND]


def test_every_record_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        journal.append(FIRST)
        journal.append(SECOND)
    lengths = [len(line) + 1 for line in path.read_bytes().splitlines()]
    assert sizes == [lengths[0], sum(lengths)], "synced after the whole record was written, before append returned"


def test_survives_a_kill(path: Path) -> None:
    script = """
        import os, signal, sys
        from headgrid.experiment.journal import Journal
        journal = Journal(sys.argv[1])
        for index in range(3):
            journal.append({"kind": "block", "block": index})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], timeout=60)
    assert done.returncode == -9
    assert [record["block"] for record in read(path)] == [0, 1, 2]
