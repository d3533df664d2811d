"""The safetensors format by byte ranges: a header says where each tensor's bytes are, and nothing is executed.

A file is 8 bytes (the header's length, little-endian), the header (JSON), and the bytes of the tensors, which follow
each other without holes. We read it ourselves because ranks share the reading by exact ranges of bytes, with pread
into buffers of their own; the safetensors library tells no offsets and maps whole files into memory.
Every claim of a header is checked against the file before anything is allocated by it.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from headgrid.errors import InvalidInput
from headgrid.models.files import inside, open_regular, parse_json, read_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = "__metadata__"
MOST_HEADER_BYTES = 16 << 20
MOST_INDEX_BYTES = 1 << 20
MOST_FILES = 1000
_MOST_TOKENS = 100_000  # commas and brackets of a header: 10 000 tensors. Bounds the time and memory of parsing it
_MOST_DIMS = 8
SAMPLES, SAMPLE_BYTES = 64, 4096
"""What a fingerprint reads of each file."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, row by row in the bytes [start_byte, stop_byte) of a file of its folder.

    `dtype` is the format's own word for it, such as BF16.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start_byte: int
    stop_byte: int

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return self.stop_byte - self.start_byte

    @property
    def row_bytes(self) -> int:
        """Size of what one index of the first dim holds."""
        return self.num_bytes // self.shape[0] if self.shape and self.shape[0] else self.num_bytes


class Checkpoint:
    """The tensors of a folder, by name in the order of files and bytes. Its files are open until `close`."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], files: Mapping[str, int]) -> None:
        """`files` are open file descriptors by name. `open_checkpoint` makes one."""
        self.folder, self._files, self.bytes_read = folder, dict(files), 0
        self.tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start_byte)))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, file: str, start_byte: int, into: memoryview) -> None:
        """Fill a writable buffer of bytes with those of `file` from `start_byte` on; `bytes_read` counts them.

        Raises InvalidInput if the file has become shorter or cannot be read.
        """
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._files[file], [into[done:]], start_byte + done)
            except OSError as error:
                raise InvalidInput(f"cannot read {shown(file)}", why=error.strerror or str(error)) from error
            if not count:
                raise InvalidInput(
                    f"{shown(file)} has become shorter while it was read",
                    numbers=f"{start_byte + len(into)} bytes are needed, it ends at {start_byte + done}",
                )
            done += count
        self.bytes_read += done

    def fingerprint(self) -> int:
        """A number of 60 bits: equal for equal checkpoints. Of names, places and some bytes of every part of the files.

        It tells another training of the same model, in a few reads; not a file of which a few bytes differ.
        """
        digest = hashlib.sha256(repr(list(self.tensors.values())).encode())
        for file, descriptor in sorted(self._files.items()):
            size = os.fstat(descriptor).st_size
            digest.update(f"{file}\0{size}\0".encode())
            for place in (*(size * n // SAMPLES for n in range(SAMPLES)), max(0, size - SAMPLE_BYTES)):
                digest.update(os.pread(descriptor, SAMPLE_BYTES, place))
        return int(digest.hexdigest()[:15], 16)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        """The checkpoint itself, for `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Only headers are read, and all of them are checked. Raises InvalidInput that names the file and what is wrong.
    """
    try:
        listed = _listed(folder)
        with ExitStack() as opened:
            files: dict[str, int] = {}
            for file in sorted(set(listed.values())) if listed is not None else [SINGLE]:
                files[file] = open_regular(inside(folder, file))
                opened.callback(os.close, files[file])
            tensors = _collected(files)
            if listed is not None:
                _check_index(listed, tensors)
            opened.pop_all()
            return Checkpoint(folder, tensors, files)
    except OSError as error:
        raise InvalidInput(f"cannot read {shown(str(folder))}", why=error.strerror or str(error)) from error


def _listed(folder: Path) -> dict[str, str] | None:
    """The file of each tensor as the index says; None where there is a single file."""
    single, index = inside(folder, SINGLE), inside(folder, INDEX)
    if os.path.lexists(single):
        return None
    if not os.path.lexists(index):
        raise _no_weights(folder)
    content = read_json(index, MOST_INDEX_BYTES)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise InvalidInput(f"{INDEX} has no weight_map", why="it must say which file holds which tensor")
    for name, file in found.items():
        if not isinstance(file, str):
            raise InvalidInput(f"{INDEX}: the file of {shown(name)} is {shown(file)}", legal=("a file name",))
    if len(set(found.values())) > MOST_FILES:
        count = len(set(found.values()))
        raise InvalidInput(f"{INDEX} names {count} files", why=f"at most {MOST_FILES} are opened")
    return found


def _no_weights(folder: Path) -> InvalidInput:
    """What to say of a folder without a checkpoint, by what lies there instead."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry, _ in zip(entries, range(10_000), strict=False))
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    strays = [name for name in names if name.endswith(".safetensors")]
    why = "it has no weights at all"
    if strays:
        why = f"{shown(strays[0])} is there, but not {INDEX}, which says what is in it"
    elif pickled:
        why = f"{shown(pickled[0])} is a pickle, which can execute code when it is read"
    return InvalidInput(
        f"{shown(str(folder))} has no safetensors checkpoint",
        why=why,
        legal=(SINGLE, INDEX),
        command="model.save_pretrained(folder)  # of transformers, writes it" if pickled else "",
    )


def _collected(files: Mapping[str, int]) -> dict[str, StoredTensor]:
    """The tensors of all files."""
    found: dict[str, StoredTensor] = {}
    for file, descriptor in files.items():
        for tensor in _tensors(file, descriptor):
            if tensor.name in found:
                where = f"{shown(found[tensor.name].file)} and {shown(file)}"
                raise InvalidInput(f"tensor {shown(tensor.name)} is in two files", numbers=where)
            found[tensor.name] = tensor
    if not found:
        raise InvalidInput("the checkpoint holds no tensors", numbers=", ".join(map(shown, list(files)[:4])))
    return found


def _check_index(listed: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """The index and the headers must say the same."""
    for name, file in listed.items():
        if name not in tensors:
            raise InvalidInput(f"tensor {shown(name)} is not in {shown(file)}", why=f"{INDEX} says that it is")
        if tensors[name].file != file:
            where = f"{INDEX} says {shown(file)}, but it is in {shown(tensors[name].file)}"
            raise InvalidInput(f"tensor {shown(name)} is in another file", numbers=where)
    for name, tensor in tensors.items():
        if name not in listed:
            raise InvalidInput(f"tensor {shown(name)} of {shown(tensor.file)} is not in {INDEX}")


def _tensors(file: str, descriptor: int) -> Iterator[StoredTensor]:
    """The tensors of one file in the order of their bytes, which they cover without holes."""
    header, first, size = _header(file, descriptor)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInput(f"{shown(file)}: {METADATA} is not an object of strings")
    found = [_tensor(file, name, entry, first) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor.start_byte, tensor.stop_byte))
    end = first
    for tensor in found:
        if tensor.start_byte != end:
            kind = "a hole" if tensor.start_byte > end else "an overlap"
            where = f"it begins at {tensor.start_byte - first}, what is before it ends at {end - first}"
            raise InvalidInput(f"{shown(file)}: {kind} before tensor {shown(tensor.name)}", numbers=where)
        end = tensor.stop_byte
    if end != size:
        raise InvalidInput(
            f"{shown(file)} is {'cut short' if end > size else 'longer than its tensors'}",
            numbers=f"its header speaks of {end} bytes, it has {size}",
        )
    yield from found


def _header(file: str, descriptor: int) -> tuple[dict[str, object], int, int]:
    """The header, the byte at which tensors begin, and the size of the file."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 10 or not 2 <= length <= size - 8:
        raise InvalidInput(
            f"{shown(file)} is not a safetensors file, or is cut short",
            numbers=f"it has {size} bytes, its first 8 speak of a header of {length}",
        )
    if length > MOST_HEADER_BYTES:
        raise InvalidInput(f"{shown(file)}: a header of {length} bytes", why=f"at most {MOST_HEADER_BYTES} are read")
    data = os.pread(descriptor, length, 8)
    tokens = sum(data.count(token) for token in (b",", b"{", b"["))
    if tokens > _MOST_TOKENS:
        raise InvalidInput(
            f"{shown(file)}: a header of {tokens} items", why=f"at most {_MOST_TOKENS} are read: 10 000 tensors"
        )
    header = parse_json(data, f"the header of {shown(file)}")
    if not isinstance(header, dict) or data[:1] != b"{":
        raise InvalidInput(f"the header of {shown(file)} is not an object")
    return header, 8 + length, size


def _tensor(file: str, name: str, entry: object, first: int) -> StoredTensor:
    """One entry of a header, whose offsets count from byte `first` of the file."""
    where = f"{shown(file)}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidInput(f"{where} needs exactly dtype, shape and data_offsets", numbers=f"it is {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InvalidInput(f"{where} has the unknown dtype {shown(dtype)}", legal=tuple(_BITS))
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS:
        numbers = f"shape {_listing(shape)}"
        raise InvalidInput(
            f"{where} has no usable shape", numbers=numbers, legal=(f"up to {_MOST_DIMS} whole numbers",)
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidInput(f"{where} has no usable data_offsets", numbers=f"data_offsets {_listing(offsets)}")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        numbers = (
            f"{dtype} {_listing(shape)} is {math.prod(shape) * _BITS[dtype] / 8:.12g} bytes, it has {stop - start}"
        )
        raise InvalidInput(f"{where} has a size that is not its shape's", numbers=numbers)
    return StoredTensor(name, file, dtype, tuple(shape), first + start, first + stop)


def _are_sizes(value: object) -> bool:
    """Whether it is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _listing(value: object) -> str:
    """A short list in full, anything else as messages show it."""
    if not isinstance(value, list) or len(value) > _MOST_DIMS:
        return shown(value)
    return f"[{', '.join(map(shown, value))}]"


def laid_out(file: str, dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, list[StoredTensor]]:
    """What a new file of these tensors begins with, and where in it each of them is to be written."""
    entries: dict[str, dict[str, object]] = {METADATA: {"format": "pt"}}  # transformers asks for it
    end, ends = 0, [0]
    for name, shape in shapes.items():
        end += math.prod(shape) * _BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [ends[-1], end]}
        ends.append(end)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    first = 8 + len(text)
    tensors = [
        StoredTensor(name, file, dtype, shape, first + ends[k], first + ends[k + 1])
        for k, (name, shape) in enumerate(shapes.items())
    ]
    return len(text).to_bytes(8, "little") + text, tensors
