"""Real text as input: bytes are tokens."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

from headgrid.errors import InvalidInput

BUILTIN = "pydoc_data.topics"


@dataclass(frozen=True, slots=True)
class Text:
    """Where the input comes from, and the hash of its bytes."""

    source: str
    sha256: str


def read(source: str) -> bytes:
    """The documentation that ships inside Python (`pydoc_data.topics`), or a file's bytes."""
    if source == BUILTIN:
        topics: dict[str, str] = importlib.import_module(BUILTIN).topics
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read text {source!r}", why=str(error), legal=(BUILTIN, "a file")) from error
    if not data:
        raise InvalidInput(f"text {source!r} is empty")
    return data


def identify(source: str) -> Text:
    """The text's identity. Raises InvalidInput if it cannot be read."""
    data = read(source)
    name = source if source == BUILTIN else str(Path(source).resolve())
    return Text(name, hashlib.sha256(data).hexdigest())


def read_identified(text: Text) -> bytes:
    """The bytes that `text` names. Raises InvalidInput if they are no longer the ones it was identified by."""
    data = read(text.source)
    found = hashlib.sha256(data).hexdigest()
    if found != text.sha256:
        raise InvalidInput(
            f"text {text.source!r} is not the one that the design declares",
            numbers=f"SHA-256 {found[:12]}, declared {text.sha256[:12]}",
            why="it was changed, or this host has another version",
        )
    return data


def token_rows(data: bytes, batch: int, seq: int) -> list[bytes]:
    """`batch` consecutive pieces of `seq` bytes. A text that is too short starts over, at another offset each time."""
    needed = batch * seq
    turns = -(-needed // len(data)) + 1
    repeated = b"".join(data[turn % len(data) :] + data[: turn % len(data)] for turn in range(turns))
    return [repeated[row * seq : (row + 1) * seq] for row in range(batch)]
