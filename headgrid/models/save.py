"""Saving a model in Hugging Face format from its shards: the exchange of loading, backwards.

Each rank writes a contiguous share of every chunk. All goes into a hidden folder beside the one that is asked for,
which gets its name when everything is in it: whatever is killed, what is half-written never looks complete.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headgrid.errors import HeadgridError, InvalidInput, NotAvailable
from headgrid.layout.layout import Layout
from headgrid.models.chunks import Chunk, Wants, chunks, stored_shapes, wants
from headgrid.models.files import inside, open_regular, read_json, shown
from headgrid.models.names import Source
from headgrid.models.safetensors import INDEX, SINGLE, StoredTensor, laid_out
from headgrid.models.stream import (
    DTYPES,
    STAGE_BYTES,
    Progress,
    Stage,
    as_stored,
    check_local,
    chunk_bytes,
    deliver,
    packed,
    parts_of_owner,
    parts_of_share,
)
from headgrid.runtime.collectives import Axis
from headgrid.spec.model import ModelSpec

MAX_SHARD_BYTES = 5_000_000_000
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "sentencepiece.bpe.model"),
)
"""What is copied from the folder a model came from, beside its config.json."""
_MOST_COMPANION_BYTES = 256 << 20
_MOST_CONFIG_BYTES = 1 << 20


@torch.no_grad()
def save(
    folder: Path,
    origin: Path | None,
    sources: Mapping[str, Source],
    model: ModelSpec,
    layout: Layout,
    axis: Axis,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stage_bytes: int = STAGE_BYTES,
) -> None:
    """Write the model into `folder`, which must not exist or be empty; all ranks of the layout call this together.

    `axis` has all of them, `weights` the tensors or views that this one would give to `load`. Numbers are rounded to
    `dtype` and stored under the names of `sources`, in files of at most `max_shard_bytes` (a larger tensor alone) with
    an index where there are several. config.json (with this dtype) and the tokenizer's files come from `origin`.
    The folder must be on a file system that all ranks see.

    Raises InvalidInput if the folder is in use or the config cannot be copied, NotAvailable if the disk is too small
    or cannot be written; on the other ranks too. Then nothing is left behind.
    """
    if sorted(axis.ranks) != list(range(layout.ranks)):
        raise ValueError(f"{len(axis.ranks)} ranks are given, all {layout.ranks} of the layout are needed")
    check_local(weights, model, layout, axis)
    device = next(iter(weights.values())).device
    like = torch.empty(0, dtype=dtype, device=device)
    files = planned_files(stored_shapes(model, sources), dtype, max_shard_bytes)
    target = folder.resolve()
    part = target.with_name(f".{target.name}.part")
    first = axis.index == 0
    _together(axis, device, target, lambda: _prepare(target, part, files, origin, dtype) if first else None)
    try:
        writer = _Writer(part)
        everyone = _one_replica(wants(model, layout, axis.ranks, sources), layout, axis)
        tensors = [tensor for file in files for tensor in file.tensors]
        stream = list(chunks(tensors, everyone, dtype.itemsize, stage_bytes))
        _write(stream, axis, everyone, weights, like, writer, progress)
        _together(axis, device, target, writer.close)
        _together(axis, device, target, lambda: _finish(part, target) if first else None)
    except BaseException:
        if first:
            with suppress(OSError):
                _discard(part)
        raise


def _one_replica(everyone: Sequence[Wants], layout: Layout, axis: Axis) -> list[Wants]:
    """What the ranks of the first replica hold; the others need not send the same again."""
    return [mine if not layout.coordinates(rank).dp else {} for rank, mine in zip(axis.ranks, everyone, strict=True)]


def _write(
    stream: Sequence[Chunk],
    axis: Axis,
    everyone: Sequence[Wants],
    weights: Mapping[str, Tensor],
    like: Tensor,
    writer: "_Writer",
    progress: Progress | None,
) -> None:
    """Bring every share together on its rank, and write it. Ranks meet in every chunk, also when one cannot write."""
    mine, stage = everyone[axis.index], Stage(stream, axis.index, like.device)
    own = as_stored(weights, mine)
    done, whole_bytes = 0, sum(map(chunk_bytes, stream))
    for chunk in stream:
        share = chunk[axis.index]
        leaving = parts_of_owner(own, chunk, mine)
        arriving = parts_of_share(stage.views(share), share, everyone)
        deliver(axis, packed(axis, leaving, arriving, like), leaving, arriving)
        stage.download(share)
        for segment, place in stage.places(share):
            writer.write(segment.tensor.file, segment.start_byte, place)
        done += chunk_bytes(chunk)
        if progress is not None:
            progress(done, whole_bytes)


class _Writer:
    """Writes ranges of bytes into the files of a folder. A failure is kept until `close`, so that no rank waits for
    another that has left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._failure: OSError | None = None

    def write(self, file: str, start_byte: int, data: memoryview) -> None:
        """Write these bytes there, unless something has failed before."""
        try:
            if file not in self._files and self._failure is None:
                self._files[file] = os.open(self._folder / file, os.O_WRONLY | os.O_CLOEXEC)
            done = 0
            while done < len(data) and self._failure is None:
                done += os.pwrite(self._files[file], data[done:], start_byte + done)
        except OSError as error:
            self._failure = error

    def close(self) -> None:
        """Wait until all is on the disk. Raises the OSError that kept something from being written."""
        with ExitStack() as opened:
            for descriptor in self._files.values():
                opened.callback(os.close, descriptor)
            if self._failure is not None:
                raise self._failure
            for descriptor in self._files.values():
                os.fsync(descriptor)


def _together(axis: Axis, device: torch.device, target: Path, do: Callable[[], None]) -> None:
    """Do it on every rank, and wait until all have. Where it fails on one, raise on all."""
    failure: HeadgridError | None = None
    try:
        do()
    except HeadgridError as error:
        failure = error
    except OSError as error:
        failure = NotAvailable(
            f"cannot write {shown(str(target))}",
            why=error.strerror or str(error),
            legal=("a folder on a file system that all ranks see",),
        )
    failed = torch.tensor([failure is not None], dtype=torch.int64, device=device)
    axis.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.item():
        raise NotAvailable(f"{shown(str(target))} is not saved", why="another rank could not do its part")


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its name, what it begins with, and the tensors in it."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.tensors[-1].stop_byte


def planned_files(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int) -> list[NewFile]:
    """The files of a new checkpoint, in order, each with at most `max_shard_bytes` of tensors, or with one.

    Raises InvalidInput for a dtype that the format is not used with.
    """
    word = next((word for word, known in DTYPES.items() if known == dtype), None)
    if word is None:
        raise InvalidInput(f"weights are not saved as {dtype}", legal=[str(known) for known in DTYPES.values()])
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + num_bytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    names = [SINGLE] if len(groups) == 1 else [_numbered(k, len(groups)) for k in range(len(groups))]
    found: list[NewFile] = []
    for name, group in zip(names, groups, strict=True):
        header, tensors = laid_out(name, word, group)
        found.append(NewFile(name, header, tuple(tensors)))
    return found


def _numbered(k: int, count: int) -> str:
    return f"model-{k + 1:05}-of-{count:05}.safetensors"


def _prepare(target: Path, part: Path, files: Sequence[NewFile], origin: Path | None, dtype: torch.dtype) -> None:
    """Make the hidden folder, with all in it but the tensors."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidInput(f"{shown(str(target))} is in use", why="a model is saved into a folder of its own")
    target.parent.mkdir(parents=True, exist_ok=True)
    _discard(part)
    needed, free = sum(file.num_bytes for file in files), shutil.disk_usage(target.parent).free
    if needed > free:
        numbers = f"{needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free"
        raise NotAvailable(f"the disk of {shown(str(target))} is too small", numbers=numbers)
    try:
        part.mkdir()
        for file in files:
            with open(part / file.name, "xb") as new:
                new.write(file.header)
                new.truncate(file.num_bytes)
        if len(files) > 1:
            (part / INDEX).write_text(_index(files), encoding="utf-8")
        if origin is not None:
            _copy_companions(origin, part, dtype)
    except BaseException:
        with suppress(OSError):
            _discard(part)
        raise


def _index(files: Sequence[NewFile]) -> str:
    tensors = [tensor for file in files for tensor in file.tensors]
    content = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": {tensor.name: tensor.file for tensor in sorted(tensors, key=lambda tensor: tensor.name)},
    }
    return json.dumps(content, indent=2) + "\n"


def _copy_companions(origin: Path, part: Path, dtype: torch.dtype) -> None:
    """config.json with its dtype made true, and the files of the tokenizer as they are."""
    config = read_json(inside(origin, "config.json"), _MOST_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise InvalidInput("config.json is not an object", numbers=shown(str(origin)))
    word = str(dtype).removeprefix("torch.")
    config |= {key: word for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        path = inside(origin, name)
        if os.path.lexists(path):
            _copy(path, part / name)


def _copy(path: Path, to: Path) -> None:
    with open(open_regular(path), "rb") as source, open(to, "xb") as new:
        size = os.fstat(source.fileno()).st_size
        if size > _MOST_COMPANION_BYTES:
            raise InvalidInput(
                f"{shown(str(path))} is too large", numbers=f"{size} bytes, at most {_MOST_COMPANION_BYTES} are copied"
            )
        shutil.copyfileobj(source, new)


def _finish(part: Path, target: Path) -> None:
    """Give the folder its name, once all that is in it is on the disk."""
    for path in (*part.iterdir(), part):
        _sync(path)
    part.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(part: Path) -> None:
    """Remove what a save left that did not end. Raises OSError if there is something that none of ours writes."""
    if part.is_symlink():
        part.unlink()
    elif part.is_dir():
        for path in part.iterdir():
            path.unlink()
        part.rmdir()
