"""Broken and hostile folders of weights: each is refused by one clear message, at once, without much memory.

Each is an intact checkpoint with one thing wrong. Where the safetensors library looks for the same thing it refuses
them too.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch
from hostile_folders import ALLOWED, BY_THE_FORMAT, BY_US, EVERY, SHAPES, intact, two_files
from safetensors.torch import save_file

from headgrid.errors import InvalidInput
from headgrid.models.chunks import check_stored
from headgrid.models.safetensors import SINGLE, open_checkpoint

MOST_SECONDS, MOST_BYTES = 1.0, 200_000_000


@contextmanager
def cheap(seconds: float = MOST_SECONDS) -> Iterator[None]:
    """The block takes less than a second of a processor, and less than 200 MB above what is resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was resident, starts anew
    before, start, entered = status_bytes("VmRSS"), time.process_time(), time.perf_counter()
    yield
    assert time.process_time() - start < seconds
    assert time.perf_counter() - entered < 15 * seconds, "waits (tests may share the processor with others)"
    assert status_bytes("VmHWM") - before < MOST_BYTES


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    intact(found)
    return found


def test_there_are_many() -> None:
    assert len(EVERY) == len(BY_THE_FORMAT) + len(BY_US) >= 90


@pytest.mark.parametrize("kind", EVERY)
def test_is_refused(kind: str, folder: Path) -> None:
    expected, change = EVERY[kind]
    change(folder)
    threads = threading.active_count()
    opened = len(os.listdir("/proc/self/fd"))
    with cheap(), pytest.raises(InvalidInput) as raised:
        open_checkpoint(folder)
    block = raised.value.block()
    assert expected in block
    assert len(block.splitlines()) <= 6
    assert max(map(len, block.splitlines())) < 400
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", block)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, opened), "nothing stays open"


@pytest.mark.parametrize("kind", BY_THE_FORMAT)
def test_the_library_refuses_it_too(kind: str, folder: Path) -> None:
    BY_THE_FORMAT[kind][1](folder)
    with pytest.raises((safetensors.SafetensorError, OSError)), safetensors.safe_open(folder / SINGLE, "pt") as file:
        file.keys()


def test_intact_ones_are_opened(folder: Path) -> None:
    """Otherwise all of the above could be refused for another reason."""
    for change in (lambda folder: None, two_files()):
        change(folder)
        with cheap(), open_checkpoint(folder) as checkpoint:
            assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == SHAPES
            assert checkpoint.num_bytes == 116


def test_the_bounds_can_be_exceeded() -> None:
    start = time.process_time()
    with pytest.raises(AssertionError), cheap(0.02):
        while time.process_time() - start < 0.05:
            pass
    with pytest.raises(AssertionError), cheap():
        b"x" * (MOST_BYTES * 11 // 10)


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_is_odd_but_harmless_is_read(kind: str, folder: Path) -> None:
    ALLOWED[kind](folder)
    with open_checkpoint(folder) as checkpoint, safetensors.safe_open(folder / SINGLE, "pt") as file:
        assert set(checkpoint.tensors) == set(file.keys())


def test_a_snapshot_of_the_hub_is_read(folder: Path) -> None:
    """Where every file is a link to a blob of the same repository."""
    snapshot = folder.parent / "models--x--y" / "snapshots" / "0123abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / SINGLE).rename(blobs / "f00")
    (snapshot / SINGLE).symlink_to("../../blobs/f00")
    with open_checkpoint(snapshot) as checkpoint:
        assert set(checkpoint.tensors) == set(SHAPES)


WRONG_FOR_THE_MODEL: Mapping[str, tuple[str, dict[str, tuple[int, ...]], dict[str, torch.Tensor]]] = {
    "a tensor is missing": ("lacks c.weight", SHAPES | {"c.weight": (2,)}, {}),
    "another shape": ("stored [4, 6], by the config [6, 4]", SHAPES | {"a.weight": (6, 4)}, {}),
    "a dim more": ("stored [4, 6], by the config [24]", SHAPES | {"a.weight": (24,)}, {}),
    "whole numbers": ("stored as I64", SHAPES, {"a.weight": torch.zeros(4, 6, dtype=torch.int64)}),
    "quantised to 8 bits": ("stored as I8", SHAPES, {"a.weight": torch.zeros(4, 6, dtype=torch.int8)}),
    "8-bit floats": ("stored as F8_E4M3", SHAPES, {"a.weight": torch.zeros(4, 6).to(torch.float8_e4m3fn)}),
}


@pytest.mark.parametrize("kind", WRONG_FOR_THE_MODEL)
def test_weights_that_are_not_the_models_are_refused(kind: str, folder: Path) -> None:
    expected, shapes, tensors = WRONG_FOR_THE_MODEL[kind]
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()} | tensors, folder / SINGLE)
    with open_checkpoint(folder) as checkpoint, pytest.raises(InvalidInput) as raised:
        check_stored(checkpoint.tensors, shapes)
    assert expected in raised.value.block()


def test_buffers_of_other_dtypes_may_be_there(folder: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    save_file(tensors | {"ids": torch.arange(7), "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, folder / SINGLE)
    with open_checkpoint(folder) as checkpoint:
        check_stored(checkpoint.tensors, SHAPES)
