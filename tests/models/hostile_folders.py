"""Folders of weights with one thing wrong each, and what the refusal must say."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headgrid.models.safetensors import INDEX, MOST_HEADER_BYTES, SINGLE

SHAPES = {"a.weight": (4, 6), "b.weight": (5,)}
Header = dict[str, Any]
Change = Callable[[Path], object]


def intact(folder: Path) -> None:
    save_file({"a.weight": torch.randn(4, 6), "b.weight": torch.randn(5)}, folder / SINGLE, metadata={"format": "pt"})


def parts(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def header_text(text: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> Change:
    """The file with another header and data."""

    def change(folder: Path) -> None:
        header, data = parts(folder / SINGLE)
        write(folder / SINGLE, *text(json.dumps(header).encode(), data))

    return change


def header_value(edit: Callable[[Header], object]) -> Change:
    """The file with an edited header."""

    def change(folder: Path) -> None:
        header, data = parts(folder / SINGLE)
        edit(header)
        write(folder / SINGLE, json.dumps(header).encode(), data)

    return change


def entry(**fields: object) -> Change:
    """Tensor a with other fields; None for no such field."""

    def edit(header: Header) -> None:
        header["a.weight"] = {k: v for k, v in (header["a.weight"] | fields).items() if v is not None}

    return header_value(edit)


def length(value: int) -> Change:
    return lambda folder: write(folder / SINGLE, *map(bytes, (b"{}", b"")), length=value)


def only(header: bytes) -> Change:
    """A file with this header and no data."""
    return lambda folder: write(folder / SINGLE, header)


def raw(data: bytes) -> Change:
    return lambda folder: (folder / SINGLE).write_bytes(data)


def replaced(make: Callable[[Path], object]) -> Change:
    """Something else in the place of the file."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        make(folder / SINGLE)

    return change


def sparse(path: Path) -> None:
    """A terabyte without any bytes on the disk."""
    with open(path, "r+b") as file:
        file.truncate(1 << 40)


def two_files(
    index: Callable[[dict[str, Any]], object] = lambda index: None, more: Callable[[Path], object] = lambda folder: None
) -> Change:
    """A checkpoint of two files, with an edited index and whatever else."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        files = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
        for name, file in files.items():
            save_file({name: torch.randn(SHAPES[name])}, folder / file)
        content = {"metadata": {"total_size": 116}, "weight_map": dict(files)}
        index(content)
        (folder / INDEX).write_text(json.dumps(content))
        more(folder)

    return change


def mapped(name: str, file: object) -> Change:
    return two_files(lambda index: index["weight_map"].update({name: file}))


def swapped(files: dict[str, str]) -> dict[str, str]:
    return dict(zip(files, reversed(files.values()), strict=True))


def index_text(text: str) -> Change:
    return two_files(more=lambda folder: (folder / INDEX).write_text(text))


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    save_file({"a.weight": torch.randn(4, 6)}, outside / "x.safetensors")
    file = folder / "model-00001-of-00002.safetensors"
    file.unlink()
    file.symlink_to(outside / "x.safetensors")


def subfolder(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "sub" / "x.safetensors")


def doubled(folder: Path) -> None:
    """Both files hold b, wherever the index says it is."""
    save_file({"a.weight": torch.randn(4, 6), "b.weight": torch.randn(5)}, folder / "model-00001-of-00002.safetensors")


def without_weights(*names: str) -> Change:
    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"\x80\x04.")

    return change


def many(count: int, item: str) -> bytes:
    return ("{" + ",".join(item % k for k in range(count)) + "}").encode()


def as_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("no folder")


BY_THE_FORMAT: Mapping[str, tuple[str, Change]] = {
    "empty file": ("cut short", raw(b"")),
    "seven bytes": ("cut short", raw(b"\1\0\0\0\0\0\0")),
    "header of no length": ("header of 0", length(0)),
    "header longer than the file": ("header of 1000", length(1000)),
    "header of 2^63 bytes": ("header of 9223372036854775808", length(1 << 63)),
    "header of 2^64 - 1 bytes": ("header of 18446744073709551615", length((1 << 64) - 1)),
    "header is not JSON": ("not JSON", only(b"{'a': 1}  ")),
    "header is not UTF-8": ("not JSON in UTF-8", only(b'{"\xff\xfe": 1}')),
    "header is a list": ("not an object", only(b"[1, 2, 3]")),
    "header is a number": ("not an object", only(b"12345678")),
    "header nested 50 000 deep": ("too deeply", only(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}")),
    "entry is a list": ("exactly dtype", header_value(lambda header: header.update({"a.weight": [1, 2]}))),
    "entry is null": ("exactly dtype", header_value(lambda header: header.update({"a.weight": None}))),
    "no dtype": ("exactly dtype", entry(dtype=None)),
    "no shape": ("exactly dtype", entry(shape=None)),
    "no offsets": ("exactly dtype", entry(data_offsets=None)),
    "dtype is a number": ("unknown dtype 5", entry(dtype=5)),
    "unknown dtype": ("unknown dtype 'Q4_K'", entry(dtype="Q4_K")),
    "shape is a number": ("no usable shape", entry(shape=24)),
    "negative size": ("no usable shape", entry(shape=[-4, -6])),
    "fractional size": ("no usable shape", entry(shape=[4.0, 6])),
    "true as a size": ("no usable shape", entry(shape=[True, 24])),
    "size as text": ("no usable shape", entry(shape=["4", 6])),
    "size of 2^60": ("size that is not its shape's", entry(shape=[1 << 60, 6])),
    "sizes that overflow": ("size that is not its shape's", entry(shape=[1 << 32, 1 << 32, 6])),
    "size of 100 digits": ("100 digits", header_text(lambda h, d: (h.replace(b"[4, 6]", b"[" + b"9" * 100 + b"]"), d))),
    "size of a million digits": (
        "digits",
        header_text(lambda h, d: (h.replace(b"[4, 6]", b"[" + b"9" * 10**6 + b"]"), d)),
    ),
    "another shape": ("size that is not its shape's", entry(shape=[4, 7])),
    "another dtype": ("F16 [4, 6] is 48 bytes, it has 96", entry(dtype="F16")),
    "one offset": ("no usable data_offsets", entry(data_offsets=[0])),
    "three offsets": ("no usable data_offsets", entry(data_offsets=[0, 96, 116])),
    "negative offset": ("no usable data_offsets", entry(data_offsets=[-96, 0])),
    "offsets reversed": ("no usable data_offsets", entry(data_offsets=[96, 0])),
    "offsets nested 900 deep": (
        "no usable data_offsets",
        header_text(lambda h, d: (h.replace(b"[0, 96]", b"[" * 900 + b"]" * 900), d)),
    ),
    "offset past the end": (
        "cut short",
        header_value(lambda h: h["b.weight"].update(data_offsets=[96, 1016], shape=[230])),
    ),
    "offset of 2^62": ("a hole", header_value(lambda h: h["b.weight"].update(data_offsets=[1 << 62, (1 << 62) + 20]))),
    "tensors overlap": ("an overlap", header_value(lambda h: h["b.weight"].update(data_offsets=[76, 96]))),
    "two tensors on the same bytes": (
        "an overlap",
        header_value(lambda h: h.update({"c.weight": dict(h["b.weight"])})),
    ),
    "a hole between tensors": (
        "a hole",
        header_value(lambda h: h["b.weight"].update(data_offsets=[100, 116], shape=[4])),
    ),
    "a hole before the first": ("a hole", header_value(lambda h: h.pop("a.weight"))),
    "bytes behind the last": ("longer than its tensors", header_text(lambda h, d: (h, d + b"\0" * 8))),
    "one byte is missing": ("cut short", header_text(lambda h, d: (h, d[:-1]))),
    "all data is missing": ("cut short", header_text(lambda h, d: (h, b""))),
    "a terabyte of nothing": ("longer than its tensors", lambda folder: sparse(folder / SINGLE)),
    "metadata is a list": ("object of strings", header_value(lambda h: h.update(__metadata__=[1]))),
    "metadata holds a number": ("object of strings", header_value(lambda h: h.update(__metadata__={"format": 1}))),
    "a folder as the file": ("not a regular file", replaced(Path.mkdir)),
}
"""What the safetensors library refuses as well."""

BY_US: Mapping[str, tuple[str, Change]] = {
    "a tensor twice in a header": (
        "'b.weight' is there twice",
        header_text(lambda h, d: (h[:-1] + b', "b.weight": {"dtype":"F32","shape":[5],"data_offsets":[96,116]}}', d)),
    ),
    "a field twice": (
        "'dtype' is there twice",
        header_text(lambda h, d: (h.replace(b'"dtype": "F32"', b'"dtype": "F16", "dtype": "F32"', 1), d)),
    ),
    "NaN as a size": ("NaN is not a number", header_text(lambda h, d: (h.replace(b"[4, 6]", b"[NaN]"), d))),
    "300 dims": ("no usable shape", entry(shape=[1] * 298 + [4, 6])),
    "header of 17 MB": (
        f"at most {MOST_HEADER_BYTES}",
        header_text(lambda h, d: (h + b" " * (MOST_HEADER_BYTES + 1 - len(h)), d)),
    ),
    "header of a million numbers": ("at most 100000", only(b'{"a":[' + b"1," * 1_000_000 + b"1]}")),
    "header of 5 million lists": ("at most 100000", only(b'{"a":[' + b"[]," * 5_000_000 + b"1]}")),
    "header of 49 000 entries": ("exactly dtype", only(many(49_000, '"%d":{}'))),
    "header of 16 MB of text": ("exactly dtype", only(b'{"a":"' + b"x" * (16_000_000) + b'"}')),
    "name of 16 MB": ("exactly dtype", only(b'{"' + b"x" * (16_000_000) + b'":[]}')),
    "no tensors": ("holds no tensors", only(b"{}      ")),
    "a FIFO as the file": ("not a regular file", replaced(os.mkfifo)),
    "a device as the file": ("leads out of its folder", replaced(lambda path: path.symlink_to("/dev/zero"))),
    "a link to itself": ("leads nowhere", replaced(lambda path: path.symlink_to(path.name))),
    "a dangling link": ("leads nowhere", replaced(lambda path: path.symlink_to("gone.safetensors"))),
    "no weights": ("no weights at all", without_weights()),
    "only pickles": ("can execute code", without_weights("pytorch_model.bin")),
    "only pickles with an index": (
        "can execute code",
        without_weights("pytorch_model-00001-of-00002.bin", "x.index.json"),
    ),
    "files without their index": (
        "but not model.safetensors.index.json",
        two_files(more=lambda f: (f / INDEX).unlink()),
    ),
    "a file instead of the folder": ("is not a folder", as_file),
    "index names an absolute path": ("not the name of a file", mapped("a.weight", "/etc/passwd")),
    "index names a parent folder": ("not the name of a file", mapped("a.weight", "../secret.safetensors")),
    "index names a subfolder": (
        "not the name of a file",
        two_files(lambda i: i["weight_map"].update({"a.weight": "sub/x.safetensors"}), subfolder),
    ),
    "index names the folder": ("not the name of a file", mapped("a.weight", ".")),
    "index names nothing": ("not the name of a file", mapped("a.weight", "")),
    "index names a file with a null byte": ("not the name of a file", mapped("a.weight", "x\0.safetensors")),
    "index names a file that is missing": ("cannot read", mapped("a.weight", "model-00003-of-00002.safetensors")),
    "index names a link out": ("leads out of its folder", two_files(more=linked_out)),
    "index names a FIFO": (
        "not a regular file",
        two_files(lambda i: i["weight_map"].update(c="f"), lambda f: os.mkfifo(f / "f")),
    ),
    "index names a number": ("the file of 'a.weight' is 7", mapped("a.weight", 7)),
    "index names config.json": (
        "not a safetensors file",
        two_files(
            lambda i: i["weight_map"].update({"a.weight": "config.json"}),
            lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        ),
    ),
    "index names a tensor that its file lacks": (
        "'c.weight' is not in",
        mapped("c.weight", "model-00001-of-00002.safetensors"),
    ),
    "index swaps files": ("is in another file", two_files(lambda i: i.update(weight_map=swapped(i["weight_map"])))),
    "index leaves a tensor out": (
        "is not in model.safetensors.index.json",
        two_files(lambda i: i["weight_map"].pop("b.weight"), doubled),
    ),
    "a tensor in two files": ("'b.weight' is in two files", two_files(more=doubled)),
    "index without a weight_map": ("no weight_map", two_files(lambda i: i.pop("weight_map"))),
    "index with an empty weight_map": ("no weight_map", two_files(lambda i: i["weight_map"].clear())),
    "weight_map is a list": ("no weight_map", two_files(lambda i: i.update(weight_map=["a.weight"]))),
    "index is a list": ("no weight_map", index_text("[]")),
    "index is not JSON": ("not JSON", index_text("weight_map:")),
    "index nested 100 000 deep": ("too deeply", index_text("[" * 100_000 + "]" * 100_000)),
    "index names a tensor twice": ("there twice", index_text('{"weight_map": {"a": "x", "a": "y"}}')),
    "index of a terabyte": ("too large", two_files(more=lambda f: sparse(f / INDEX))),
    "index of half a million numbers": ("no weight_map", index_text("[" + "1," * 500_000 + "1]")),
    "index names 5000 files": (
        "names 5000 files",
        index_text(json.dumps({"weight_map": {f"t{k}": f"f{k}" for k in range(5000)}})),
    ),
    "index is a FIFO": ("not a regular file", two_files(more=lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)))),
}
"""What lies around the format, or what the library reads all the same."""
EVERY = BY_THE_FORMAT | BY_US

ALLOWED: Mapping[str, Change] = {
    "no metadata": header_value(lambda h: h.pop("__metadata__")),
    "empty metadata": header_value(lambda h: h.update(__metadata__={})),
    "spaces behind the header": header_text(lambda h, d: (h + b" " * 1000, d)),
    "a tensor without elements": header_value(
        lambda h: h.update(c={"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]})
    ),
    "a single number": header_value(lambda h: h.update(c={"dtype": "U8", "shape": [0], "data_offsets": [116, 116]})),
    "files that are nobody's": lambda folder: (folder / "consolidated.safetensors").write_bytes(b"?"),
    "pickles beside it": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"?"),
    "a link within the folder": lambda folder: (
        (folder / SINGLE).rename(folder / "data"),
        (folder / SINGLE).symlink_to("data"),
    ),
}
