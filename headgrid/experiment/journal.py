"""The journal of a run: one JSON object a line, on disk before `append` returns.

A record counts once its closing newline is on disk. A run that is killed in the middle of a write leaves a torn last
line; opening the journal removes it, reading ignores it. Damage anywhere else is an error, because silently skipping
an observation would change a published figure.

Records are chained: each line ends with the SHA-256 of the previous line's link and of the line's own content, so that
an edited, removed, inserted or moved record is found. The hash has no key: whoever rewrites a whole journal can make a
new chain, but not the link that was published before. Journals from before the chain are read as they are.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from headgrid.errors import InvalidInput

CHAIN = "chain"
_LINK = re.compile(rb'(?:, )?"chain": "([0-9a-f]{64})"\}$')


class JournalError(InvalidInput):
    """A journal is damaged in a place that a killed run cannot explain."""


@dataclass(frozen=True, slots=True)
class Seal:
    """How a journal stands: its number of records and the link of the last one, which stands for all of them.

    `unchained` records have no link of their own (an older version wrote them); `broken` are the numbers, from 1, of
    lines that do not follow from the line before them.
    """

    records: int
    link: str
    unchained: int
    broken: tuple[int, ...]


class Journal:
    """Appends records to the file at `path`; creates it, or repairs the torn tail of an earlier run.

    One writer at a time: opening a journal that another process is writing may remove the line it is writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create `path`. Raises JournalError for damage other than a torn tail, and changes nothing then."""
        self.path = Path(path)
        existed = self.path.exists()
        # Unbuffered: after a failed write nothing is left in a buffer that a later flush would write a second time.
        self._file = open(self.path, "a+b", buffering=0)
        try:
            self._end = self._repair()
            if not existed:
                _sync_folder(self.path.parent)
        except BaseException:
            self._file.close()
            raise

    def _repair(self) -> int:
        """Cut off a torn tail and return the length of the file in bytes."""
        self._file.seek(0)
        content = self._file.readall() or b""
        _, intact = _parse(content, self.path)
        if intact < len(content):
            self._file.truncate(intact)
            os.fsync(self._file.fileno())
        self._link = _seal(content[:intact]).link
        return intact

    def append(self, record: Mapping[str, Any]) -> None:
        """Write `record` as one line and wait until it is on disk.

        Raises ValueError for NaN and infinity (JSON has neither; an unknown value is `None`) and for a field named
        `chain`, before anything is written. A write that fails (a full disk) leaves the file as it was.
        """
        if not isinstance(record, Mapping):
            raise TypeError(f"a journal record is a mapping, not {type(record).__name__}")
        if CHAIN in record:
            raise ValueError(f"the field {CHAIN!r} is the journal's own")
        content = json.dumps(dict(record), allow_nan=False).encode()
        link = _next_link(self._link, content)
        line = _linked(content, link) + b"\n"
        try:
            self._write(line)
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(line)
        self._link = link

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[self._file.write(view) or 0 :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; every record is on disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return the open journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of the journal at `path` in the order they were written, without links and a torn last line."""
    return _parse(Path(path).read_bytes(), Path(path))[0]


def seal(path: str | os.PathLike[str]) -> Seal:
    """The state of the chain, without a torn last line. Raises JournalError as `read` does."""
    content = Path(path).read_bytes()
    return _seal(content[: _parse(content, Path(path))[1]])


def _seal(content: bytes) -> Seal:
    link, records, unchained, broken = "", 0, 0, []
    for records, (body, stated) in enumerate(map(_unlinked, content.split(b"\n")[:-1]), start=1):
        expected = _next_link(link, body)
        unchained += stated is None
        # Once there is a chain it does not end; behind a break the stated link is followed, so each break counts once.
        if stated != expected and (stated is not None or unchained < records):
            broken.append(records)
        link = stated or expected
    return Seal(records, link, unchained, tuple(broken))


def _next_link(link: str, content: bytes) -> str:
    return hashlib.sha256(link.encode() + content).hexdigest()


def _linked(content: bytes, link: str) -> bytes:
    """A record's line: its content with one more field at the end."""
    comma = b", " if content != b"{}" else b""
    return content[:-1] + comma + f'"{CHAIN}": "{link}"}}'.encode()


def _unlinked(line: bytes) -> tuple[bytes, str | None]:
    """The inverse of `_linked`; None for a line without a link."""
    found = _LINK.search(line)
    return (line[: found.start()] + b"}", found[1].decode()) if found else (line, None)


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records in `content` and how many of its bytes they fill."""
    lines = content.split(b"\n")
    tail = lines.pop()  # what follows the last newline: nothing, or a torn line
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse_line(line))
        except ValueError as error:
            # A crash of the machine may keep the length of the last write but not its bytes, newline included.
            if number == len(lines) and not tail:
                return records, len(content) - len(line) - 1
            raise JournalError(f"{path}, line {number}: not a journal record ({error})") from error
    return records, len(content) - len(tail)


def _parse_line(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    if not isinstance(record, dict):
        raise ValueError(f"an object is needed, this is {type(record).__name__}")
    record.pop(CHAIN, None)
    return record


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. JSON may name a field twice, and then each reader takes the value it likes."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _sync_folder(folder: Path) -> None:
    """Make the new file's name survive a crash of the machine, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
