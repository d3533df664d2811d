"""Reading files of a folder that may be hostile: only regular files, only from inside, never more than a limit.

Nothing here blocks (a FIFO is refused), follows a link out of the folder, or runs what it reads.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import NoReturn

from headgrid.errors import InvalidInput

_LONGEST_NUMBER = 32  # characters; Python itself takes quadratic time for very long whole numbers
_LONGEST_PATH = 500


def shown(value: object, longest: int = 60) -> str:
    """A value as a message may show it: on one line, without control characters, at most `longest` characters long."""
    if isinstance(value, str | bytes):
        value = value[: longest + 1]  # the rest is not shown anyway
    elif isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value)} entries"
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _path(path: Path) -> str:
    return shown(str(path), _LONGEST_PATH)


def inside(folder: Path, name: str) -> Path:
    """The real path of the file `name` of `folder`, whether or not it exists.

    A link is followed only to a file inside the folder; in a snapshot of a Hugging Face cache
    (`models--X/snapshots/REVISION`) also into `blobs` of the same `models--X`.

    Raises InvalidInput if `folder` is not a folder, `name` is not a plain file name, or it is another link.
    """
    root = _real_folder(folder)
    if name in ("", ".", "..") or any(c in name for c in "/\\\0") or len(os.fsencode(_encodable(name))) > 255:
        raise InvalidInput(
            f"{shown(name)} is not the name of a file",
            numbers=f"in {_path(folder)}",
            why="files of a model lie in its folder itself: paths, subfolders and .. are not followed",
        )
    path = root / name
    try:
        if not path.is_symlink():
            return path
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidInput(f"{_path(path)} is not there or leads nowhere", why=_reason(error)) from None
    if target.is_relative_to(root) or target.parent == _blobs(root):
        return target
    raise InvalidInput(
        f"the link {shown(name)} leads out of its folder",
        numbers=f"{_path(root)} -> {_path(target)}",
        why="a model could otherwise make any file of this machine be read as its own",
        legal=("a file", "a link to a file of the folder", "a snapshot of a Hugging Face cache"),
    )


def _real_folder(folder: Path) -> Path:
    try:
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        legal = ("the folder with config.json and *.safetensors",)
        raise InvalidInput(f"there is no folder {_path(folder)}", why=_reason(error), legal=legal) from None
    if not root.is_dir():
        raise InvalidInput(f"{_path(folder)} is not a folder", legal=("the folder with config.json and *.safetensors",))
    return root


def _blobs(root: Path) -> Path | None:
    """Where the files of a snapshot of a Hugging Face cache lie; None for any other folder."""
    snapshots = root.parent
    known = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent / "blobs" if known else None


def _encodable(name: str) -> str:
    """Half a surrogate pair, which JSON may hold, is in no file name."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def open_regular(path: Path) -> int:
    """A file descriptor for reading, which the caller closes. `path` is one that `inside` returned.

    Raises InvalidInput if it does not exist, may not be read, or is not a regular file (a folder, FIFO, device or
    link): none of them is waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {_path(path)}", why=_reason(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInput(f"{_path(path)} is not a regular file", why="folders, FIFOs and devices are not read")
    return descriptor


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """All of a file. Raises InvalidInput as `open_regular`, or if it exceeds the limit."""
    with open(open_regular(path), "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise InvalidInput(
            f"{_path(path)} is too large",
            numbers=f"{os.path.getsize(path)} bytes, at most {limit_bytes} are read",
        )
    return data


def read_json(path: Path, limit_bytes: int, where: str = "") -> object:
    """What a JSON file holds; messages call it `where` (a file of a cache has a number for a name).

    Raises InvalidInput as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit_bytes), where or path.name)


def parse_json(data: bytes, where: str) -> object:
    """The value of a JSON text in UTF-8, `where` naming it in messages.

    Raises InvalidInput for what is not strictly JSON or is ambiguous: a key twice in one object, NaN, Infinity,
    numbers that a double cannot hold, nesting deeper than the interpreter's stack.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise InvalidInput(f"{where}: the key {shown(twice)} is there twice")
        return found

    def constant(text: str) -> NoReturn:
        raise InvalidInput(f"{where}: {text} is not a number", why="JSON has neither NaN nor Infinity")

    def whole(text: str) -> int:
        if len(text) > _LONGEST_NUMBER:
            raise InvalidInput(f"{where}: a whole number of {len(text)} digits")
        return int(text)

    def real(text: str) -> float:
        if not math.isfinite(float(text)):
            raise InvalidInput(f"{where}: {shown(text)} is too large for a number")
        return float(text)

    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=whole, parse_float=real
        )
    except RecursionError:
        raise InvalidInput(f"{where}: objects and lists are nested too deeply") from None
    except InvalidInput:
        raise
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InvalidInput(f"{where} is not JSON in UTF-8", why=shown(str(error))) from None
