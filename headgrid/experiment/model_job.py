"""Running a checkpoint by one command: what was asked for, settled before any rank starts, and how ranks report."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput, InvalidLayout, NotAvailable
from headgrid.experiment import budget, fp8
from headgrid.experiment.design import Device
from headgrid.experiment.machine import ensure_devices, look
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, default_layout
from headgrid.models.pretrained import Pretrained, open_pretrained
from headgrid.spec.workload import Workload, dtype_name

Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options that commands on a checkpoint have in common; None means the default."""

    folder: Path
    layout: str | None = None
    ranks: int | None = None
    dtype: str | None = None
    device: str | None = None
    started_ranks: int | None = None
    """Ranks that a launcher has already started."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The same, decided: `pretrained` is opened and checked, and the layout is legal for it."""

    pretrained: Pretrained
    layout: Layout
    dtype: str
    device: Device
    free_bytes: int

    @property
    def backend(self) -> str:
        """torch's name of the communication library."""
        return "nccl" if self.device == "cuda" else "gloo"

    def payload(self, **more: Any) -> dict[str, Any]:
        """What ranks are told."""
        folder = str(self.pretrained.folder.absolute())
        return {"folder": folder, "layout": str(self.layout), "dtype": self.dtype, "device": self.device} | more

    def ensure(self, workload: Workload) -> None:
        """Raise InvalidLayout if the layout cannot run this workload, NotAvailable if memory is too small for it."""
        check(self.pretrained.spec, self.layout, workload)
        try:
            budget.ensure_fits(self.pretrained.spec, [self.layout], workload, self.device, self.free_bytes)
        except NotAvailable as error:
            error.legal = ("more --ranks", "fewer or shorter prompts", "fewer new tokens", "--dtype bf16")
            raise


def settle(wanted: Wanted, batch: int) -> Settled:
    """Open the folder, find the devices, choose the layout. Raises before any process starts."""
    if wanted.device not in (None, "cpu", "cuda"):
        raise InvalidInput(f"device {wanted.device!r} is not known", legal=("cpu", "cuda"))
    dtype = dtype_name(wanted.dtype) if wanted.dtype is not None else None
    asked = parse_layout(wanted.layout) if wanted.layout is not None else None
    pretrained = open_pretrained(wanted.folder)
    ranks = _ranks(wanted, asked)
    machine = look(ranks, wanted.device)  # type: ignore[arg-type]
    ranks = ranks or (machine.num_devices if machine.device == "cuda" else 1)
    ensure_devices(machine, ranks, started=wanted.started_ranks is not None)
    layout = asked or default_layout(pretrained.spec, ranks, batch)
    check(pretrained.spec, layout, ranks=ranks)
    fp8.ensure(pretrained.spec, [layout], machine.device)
    free_bytes = look(ranks, machine.device).free_bytes
    return Settled(pretrained, layout, dtype or pretrained.dtype, machine.device, free_bytes)


def _ranks(wanted: Wanted, asked: Layout | None) -> int | None:
    """The number of ranks, if anything says it."""
    said = {
        "--ranks": wanted.ranks,
        "--layout": asked.ranks if asked is not None else None,
        "the launcher": wanted.started_ranks,
    }
    known = {name: ranks for name, ranks in said.items() if ranks is not None}
    if len(set(known.values())) > 1:
        raise InvalidLayout(
            "the numbers of ranks differ", numbers=", ".join(f"{name}: {ranks}" for name, ranks in known.items())
        )
    return next(iter(known.values()), None)


class Events:
    """Rank 0's side: one JSON object a line, which the command that started the ranks reads as they come."""

    def __init__(self, rank: int, path: str, listener: Listener | None = None) -> None:
        """Other ranks say nothing. With a `listener` in this process nothing is written."""
        self._listener = listener if rank == 0 else None
        self._file = open(path, "a", encoding="utf-8") if rank == 0 and listener is None else None

    def tell(self, kind: str, **values: Any) -> None:
        """Report an event."""
        event = {"event": kind, **values}
        if self._listener is not None:
            self._listener(event)
        if self._file is not None:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()


class Tail:
    """The other side: events of a file that is being written."""

    def __init__(self, path: Path) -> None:
        """The file need not exist yet."""
        self._path, self._offset = path, 0

    def new(self) -> Iterator[Event]:
        """What has been told since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def predicted(settled: Settled, workload: Workload) -> dict[str, int]:
    """Predicted bytes of the fullest rank."""
    memory = budget.worst(settled.pretrained.spec, settled.layout, workload)
    return asdict(memory) | {"total_bytes": memory.total_bytes}
