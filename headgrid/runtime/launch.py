"""Starts ranks on this host and looks after them, or joins those that torchrun started.

The only place that reads or sets environment variables. Ranks come from a fork server that has torch loaded: 16 start
in about a second, against a minute by spawning. They meet through a file, so no port is opened, and gloo is bound to
the loopback interface. torchrun's ranks meet through its store, and gloo is bound to the interface that leads to the
other hosts: left alone it listens where the host's own name resolves to, often the loopback interface. Processes of
torchrun's that supervise (`crew`) start one rank each, which meet through that store, too.
"""

import faulthandler
import importlib
import json
import multiprocessing as mp
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from headgrid.errors import HeadgridError, RankDied
from headgrid.runtime.hosts import interface_of, is_loopback, local_address
from headgrid.runtime.lifeline import GRACE_S, lifeline
from headgrid.runtime.meeting import Meeting, PeerLost, Place

_TIMEOUT = timedelta(minutes=30)
_STORE_GONE = timedelta(seconds=5)
"""Within which a store that is still there answers a process that is about to end."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank runs: the function `target` ("package.module:name") called with (rank, ranks, payload)."""

    target: str
    payload: dict[str, Any]
    ranks: int
    backend: str


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the one rank sits that this process starts; the others are started by others of the launcher's.

    They meet in the store at `address`, under a `prefix` that no other launch has. `interface`: gloo's; None as it is.
    """

    rank: int
    local_rank: int
    address: str
    port: int
    prefix: str
    interface: str | None


def joined_by_torchrun() -> bool:
    """Whether a launcher has already started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher says."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def ranks_here(ranks: int) -> int:
    """How many of so many ranks are on this host: all, but where a launcher has started them host by host.

    At least 1, for what is divided by it.
    """
    if not joined_by_torchrun():
        return ranks
    here = place()
    return max(1, min(ranks - here.first_of_host, here.local_ranks))


def machine_environment() -> dict[str, str]:
    """The environment variables that change what is measured (no others, so that no secret is recorded)."""
    prefixes = ("NCCL_", "TORCH_", "OMP_", "MKL_", "GLOO_", "CUDA_", "TRITON_", "PYTORCH_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def place() -> Place:
    """Where the launcher has put this process."""
    rank, ranks = torchrun_rank()
    return Place(
        rank,
        ranks,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "0")),
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _store(timeout: timedelta = _TIMEOUT) -> Any:
    """The launcher's store; where it has none, rank 0 makes one."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timeout))[0]


@dataclass(frozen=True, slots=True)
class Met:
    """The processes that torchrun has started, once all are there: their store, what each said, gloo's interface."""

    here: Place
    store: Any
    everyone: list[dict[str, Any]]
    interface: str | None


@contextmanager
def met(backend: str, grace_s: float = GRACE_S) -> Iterator[Met]:
    """Wait for all processes that torchrun started; inside the block each of them ends where another is lost.

    Raises RankDied if some do not come or are lost on the way, and what another one has refused.
    """
    here, store = place(), _store()
    everyone = Meeting(store, here).arrive()
    told = backend != "gloo" or "GLOO_SOCKET_IFNAME" in os.environ
    others = _other_hosts(here, everyone)
    with lifeline(Meeting(store.clone(), here), others, grace_s=grace_s), losses_told(here.rank, here.ranks):
        yield Met(here, store, everyone, None if told else interface_among(here, everyone))


@contextmanager
def joined(backend: str) -> Iterator[None]:
    """The default process group of ranks that torchrun started, for the length of the block.

    Raises RankDied if ranks do not come or are lost on the way, and what another rank has refused.
    """
    import torch.distributed as dist

    with met(backend) as found:
        here, store = found.here, found.store
        _use_device(here.local_rank, backend)
        if found.interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = found.interface
        ranks = {"store": store, "rank": here.rank, "world_size": here.ranks}
        dist.init_process_group(backend, **ranks, timeout=_TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()


def interface_among(here: Place, everyone: list[dict[str, Any]]) -> str | None:
    """The network interface by which the other ranks reach this one; None if it cannot be told.

    It is the one on the way to the launcher's address. On the host that has this address, its name may lead to the
    loopback interface (Debian's /etc/hosts does that): then the one on the way to another host is taken.
    """
    mine = everyone[here.rank]
    address = mine["address"]
    if address is not None and is_loopback(address):
        others = [each["address"] for each in everyone if each["host"] != mine["host"] and each["address"]]
        away = next((each for each in others if not is_loopback(each)), None)
        address = local_address(away, here.port) if away is not None else address
    return interface_of(address) if address is not None else None


def _other_hosts(here: Place, everyone: list[dict[str, Any]]) -> list[int]:
    """The first rank of each host but this one's."""
    first: dict[str, int] = {}
    for rank, each in enumerate(everyone):
        first.setdefault(each["host"], rank)
    return [rank for host, rank in first.items() if host != everyone[here.rank]["host"]]


@contextmanager
def losses_told(rank: int, ranks: int) -> Iterator[None]:
    """What torch raises where another rank is gone, as PeerLost."""
    from torch.distributed import DistError

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, DistError) and "gloo" not in text.lower():
            raise
        raise PeerLost(
            f"rank {rank} of {ranks} has lost another rank",
            numbers=" ".join(text.split())[:300],
            why="a rank ended before its work was done, or the network between the hosts is interrupted",
            command="see what the launcher says of the ranks on each host",
        ) from error


def settle(error: HeadgridError) -> tuple[HeadgridError | None, Callable[[], None]]:
    """Tell the other ranks that the launcher started of this one's failure.

    What this rank has to show of it (None: another rank of the host shows it), and what to call once it is shown.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the ranks beside one that has ended
    try:
        meeting = Meeting(_store(_STORE_GONE), place())
        return meeting.settle(error), meeting.told
    except (RuntimeError, OSError):  # the store is gone with the launcher's first agent, as all ranks here will see
        said_by_first = isinstance(error, PeerLost) and place().local_rank > 0
        return None if said_by_first else error, lambda: None


def call(job: Job) -> None:
    """Run the job in this process, one of torchrun's, inside `joined`."""
    _call(job, *torchrun_rank())


def _call(job: Job, rank: int, ranks: int) -> None:
    module, _, name = job.target.partition(":")
    getattr(importlib.import_module(module), name)(rank, ranks, job.payload)


def _use_device(local_rank: int, backend: str) -> None:
    import torch

    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this rank as soon as the command that started it is gone, however it went."""
    parent = mp.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rank_main(rank: int, job: Job, folder: str, seat: Seat | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    _end_with_parent()
    log = open(Path(folder) / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    try:
        with nullcontext() if seat is None else losses_told(rank, job.ranks):
            _in_group(rank, job, folder, seat)
    except HeadgridError as error:
        said = {"block": error.block(), "code": error.exit_code, "lost": isinstance(error, PeerLost)}
        (Path(folder) / f"rank{rank}.error").write_text(json.dumps(said))
        raise
    (Path(folder) / f"rank{rank}.done").touch()


def _in_group(rank: int, job: Job, folder: str, seat: Seat | None) -> None:
    """Do the job's work inside its process group."""
    import torch.distributed as dist

    interface = seat.interface if seat is not None else "lo" if job.backend == "gloo" else None
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    _use_device(rank if seat is None else seat.local_rank, job.backend)
    store = _meeting_place(Path(folder), job.ranks, seat)
    dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.ranks, timeout=_TIMEOUT)
    _call(job, rank, job.ranks)
    dist.destroy_process_group()


def _meeting_place(folder: Path, ranks: int, seat: Seat | None) -> Any:
    """The store through which a job's ranks find each other: a file, or the launcher's under a name of its own."""
    from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

    if seat is None:
        return FileStore(str(folder / "store"), ranks)
    os.environ.update(RANK=str(seat.rank), WORLD_SIZE=str(ranks))
    return PrefixStore(seat.prefix, TCPStore(seat.address, seat.port, is_master=False, timeout=_TIMEOUT))


def _preload() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "headgrid.runtime.engine"])
    return context


def run(
    job: Job,
    *,
    on_poll: Callable[[], None] = lambda: None,
    log_to: Path | None = None,
    seat: Seat | None = None,
    poll_s: float = 0.1,
) -> None:
    """Start `job.ranks` ranks on this host, or the one of a `seat`, and wait; `on_poll` is called every `poll_s`.

    Whatever happens (a rank dies, Ctrl-C, an error here), no process is left behind. Raises RankDied that names the
    first rank that died, or the rank's own HeadgridError. `log_to` receives the ranks' output.
    """
    context = _preload()
    folder = Path(tempfile.mkdtemp(prefix="headgrid-"))
    numbers = range(job.ranks) if seat is None else (seat.rank,)
    ranks = {r: context.Process(target=_rank_main, args=(r, job, str(folder), seat), name=f"rank{r}") for r in numbers}
    try:
        for process in ranks.values():
            process.start()
        on_poll()
        while any(process.exitcode is None for process in ranks.values()):
            wait([process.sentinel for process in ranks.values() if process.exitcode is None], timeout=poll_s)
            _raise_if_dead(ranks, job.ranks, folder, log_to)
            on_poll()
        _raise_if_dead(ranks, job.ranks, folder, log_to)  # the last may have died since the loop looked
    finally:
        for process in ranks.values():
            if process.pid is not None:
                process.kill()
                process.join()
        if log_to is not None:
            _keep_logs(folder, log_to)
        shutil.rmtree(folder, ignore_errors=True)


def _raise_if_dead(ranks: dict[int, Any], of: int, folder: Path, log_to: Path | None) -> None:
    ended = [(r, process) for r, process in ranks.items() if process.exitcode is not None]
    dead = [(r, p) for r, p in ended if p.exitcode or not (folder / f"rank{r}.done").exists()]
    if not dead:
        return
    time.sleep(0.2)  # a rank that fails pulls others down: let the first cause be written
    for r, _ in dead:
        error = folder / f"rank{r}.error"
        if error.exists():
            found = json.loads(error.read_text())
            raise (_ReportedLoss if found["lost"] else _Reported)(found["block"], found["code"])
    r, process = min(dead, key=lambda found: found[1].exitcode)  # killed, or gone without a word, before who lost it
    how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended with code {process.exitcode}"
    how += " before its work was done" if not process.exitcode else ""
    tail = _tail(folder / f"rank{r}.log")
    raise RankDied(
        f"rank {r} of {of} {how}",
        numbers=tail,
        why="perhaps the out-of-memory killer" if process.exitcode == -signal.SIGKILL else "",
        command=f"see {log_to / f'rank{r}.log'}" if log_to else "",
    )


class _Reported(HeadgridError):
    """An error that a rank has already put into words."""

    def __init__(self, block: str, exit_code: int) -> None:
        super().__init__(block)
        self._block, self.exit_code = block, exit_code

    def block(self) -> str:
        return self._block


class _ReportedLoss(_Reported, PeerLost):
    """The same of a rank that has lost another one."""


def _tail(path: Path, lines: int = 1) -> str:
    try:
        text = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return " | ".join(text[-lines:])


def _keep_logs(folder: Path, to: Path) -> None:
    for log in folder.glob("rank*.log"):
        if log.stat().st_size:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, to / log.name)
