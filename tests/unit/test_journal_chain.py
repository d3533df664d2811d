"""The chain of a journal finds every change to what was written, and no kill breaks it."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headgrid.experiment.journal import Journal, JournalError, read, seal

WRITER = """
import random, sys
from headgrid.experiment.journal import Journal
path, first, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw, journal = random.Random(seed), Journal(path)
sys.stdout.write("0"); sys.stdout.flush()
for number in range(first, first + 1_000_000):
    journal.append({"kind": "block", "number": number, "prefill_s": [draw.random()] * draw.choice((1, 40, 3_000))})
    sys.stdout.write("."); sys.stdout.flush()
"""


def journal_of(path: Path, count: int = 6) -> list[bytes]:
    with Journal(path) as journal:
        for number in range(count):
            journal.append({"kind": "block", "number": number, "prefill_s": [0.5 + number / 8]})
    return path.read_bytes().splitlines(keepends=True)


def test_links_are_what_the_documentation_says(tmp_path: Path) -> None:
    """Computed here from the words of docs/run-folder.md alone."""
    link = ""
    for line in journal_of(tmp_path / "journal.jsonl"):
        found = re.fullmatch(r'(.*), "chain": "([0-9a-f]{64})"\}\n', line.decode())
        assert found is not None
        link = hashlib.sha256((link + found[1] + "}").encode()).hexdigest()
        assert found[2] == link
    assert seal(tmp_path / "journal.jsonl").link == link


def test_an_untouched_journal_is_whole_and_reads_without_links(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal_of(path)
    journal_of(path)  # opened again, as a resumed run does
    state = seal(path)
    assert (state.records, state.unchained, state.broken) == (12, 0, ())
    assert [record["number"] for record in read(path)] == [*range(6), *range(6)]
    assert all(set(record) == {"kind", "number", "prefill_s"} for record in read(path))


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], tuple[int, ...]]] = {
    "edited": (lambda x: [*x[:2], x[2].replace(b"0.75", b"0.65"), *x[3:]], (3,)),
    "a digit that changes no value": (lambda x: [*x[:2], x[2].replace(b"0.75", b"0.750"), *x[3:]], (3,)),
    "removed": (lambda x: [*x[:2], *x[3:]], (3,)),
    "first removed": (lambda x: x[1:], (1,)),
    "inserted copy": (lambda x: [*x[:3], x[2], *x[3:]], (4,)),
    "swapped": (lambda x: [x[0], x[2], x[1], *x[3:]], (2, 3, 4)),
    "link taken off": (lambda x: [*x[:2], re.sub(rb', "chain": "[^"]*"', b"", x[2]), *x[3:]], (3,)),
    "unchained line at the end": (lambda x: [*x, b'{"kind": "end"}\n'], (7,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found_where_it_is(tmp_path: Path, change: str) -> None:
    path = tmp_path / "journal.jsonl"
    edit, broken = CHANGES[change]
    path.write_bytes(b"".join(edit(journal_of(path))))
    assert seal(path).broken == broken


def test_a_journal_without_links_is_told_apart_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": "launch"}\n{"kind": "end"}\n')
    assert (seal(path).unchained, seal(path).broken) == (2, ())
    lines = journal_of(path)
    assert (seal(path).records, seal(path).unchained, seal(path).broken) == (8, 2, ())
    path.write_bytes(b"".join([lines[0].replace(b"launch", b"lunch"), *lines[1:]]))
    assert seal(path).broken == (3,), "the first link covers what was there before it"


def test_the_last_link_tells_that_the_end_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = journal_of(path)
    before = seal(path)
    path.write_bytes(b"".join(lines[:-1]))
    assert seal(path).broken == () and seal(path).link != before.link


def test_refuses_a_field_of_its_own_name_and_fields_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal, pytest.raises(ValueError, match="chain"):
        journal.append({"chain": "0"})
    path.write_text('{"kind": "block", "kind": "end"}\n{"kind": "end"}\n')
    with pytest.raises(JournalError, match="twice"):
        read(path)


LATE = WRITER.replace("import Journal", "import Journal\nJournal._write = lambda self, line: None")


def kill_while_writing(path: Path, first: int, seed: int, wait_s: float, script: str = WRITER) -> int:
    """Let a process append, SIGKILL it, and return how many appends it had reported as done."""
    command = [sys.executable, "-S", "-c", script, str(path), str(first), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.read(1) == b"0", "the journal could be opened"
        time.sleep(wait_s)
        os.kill(writer.pid, signal.SIGKILL)
        return len(writer.stdout.read())


@pytest.mark.timeout(1800)
def test_kills_at_random_moments_lose_nothing_and_leave_nothing_half(
    tmp_path: Path, budget: Callable[[int, int], int]
) -> None:
    """Each journal outlives five kills: what was reported as written is there, in order, and the chain is whole."""
    draw, before = random.Random(20261122), 0
    for turn in range(budget(40, 1000)):
        path = tmp_path / f"{turn // 5}.jsonl"
        before = before if path.exists() else 0
        reported = kill_while_writing(path, before, turn, draw.random() * 0.02)
        numbers, state = [record["number"] for record in read(path)], seal(path)
        assert numbers == list(range(len(numbers))), "no record is missing, twice or half"
        assert before + reported <= len(numbers) <= before + reported + 1, "at most one was written and not reported"
        assert state.broken == () and state.unchained == 0 and state.records == len(numbers)
        before = len(numbers)


def test_a_writer_that_reports_too_early_loses_records(tmp_path: Path) -> None:
    """The negative control of the test above."""
    reported = kill_while_writing(tmp_path / "journal.jsonl", 0, 0, 0.02, LATE)
    assert reported > len(read(tmp_path / "journal.jsonl")) == 0
