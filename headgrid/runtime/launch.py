"""Starts ranks on this host and looks after them, or joins those that torchrun started.

The only place that reads or sets environment variables. Ranks come from a fork server that has torch loaded: 16 start
in about a second, against a minute by spawning. They meet through a file, so no port is opened, and gloo is bound to
the loopback interface. torchrun's ranks meet through its store, and gloo is bound to the interface that leads to the
other hosts: left alone it listens where the host's own name resolves to, often the loopback interface.
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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from headgrid.errors import HeadgridError, RankDied
from headgrid.runtime.hosts import interface_of, is_loopback, local_address
from headgrid.runtime.lifeline import lifeline
from headgrid.runtime.meeting import Meeting, PeerLost, Place

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank runs: the function `target` ("package.module:name") called with (rank, ranks, payload)."""

    target: str
    payload: dict[str, Any]
    ranks: int
    backend: str


def joined_by_torchrun() -> bool:
    """Whether a launcher has already started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher says."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


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


def _store() -> Any:
    """The launcher's store; where it has none, rank 0 makes one."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=_TIMEOUT))[0]


@contextmanager
def joined(backend: str) -> Iterator[None]:
    """The default process group of ranks that torchrun started, for the length of the block.

    Raises RankDied if ranks do not come or are lost on the way, and what another rank has refused.
    """
    import torch.distributed as dist

    here, store = place(), _store()
    meeting = Meeting(store, here)
    everyone = meeting.arrive()
    _use_device(here.local_rank, backend)
    if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_among(here, everyone)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    others = _other_hosts(here, everyone)
    with lifeline(Meeting(store.clone(), here), others), _losses_told(here):
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
def _losses_told(here: Place) -> Iterator[None]:
    """What torch raises where another rank is gone, as PeerLost."""
    from torch.distributed import DistError

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, DistError) and "gloo" not in text.lower():
            raise
        raise PeerLost(
            f"rank {here.rank} of {here.ranks} has lost another rank",
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
        meeting = Meeting(_store(), place())
        return meeting.settle(error), meeting.told
    except (RuntimeError, OSError):  # the store is gone with the launcher's first agent
        return error, lambda: None


def share_text(text: str) -> str:
    """Rank 0's text on every rank of the default group."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    data = data if dist.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


def call(job: Job, *more: Any) -> None:
    """Run the job in this process, one of torchrun's, inside `joined`; the target gets `more` behind the payload."""
    _call(job, *torchrun_rank(), *more)


def _call(job: Job, rank: int, ranks: int, *more: Any) -> None:
    module, _, name = job.target.partition(":")
    getattr(importlib.import_module(module), name)(rank, ranks, job.payload, *more)


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


def _rank_main(rank: int, job: Job, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    _end_with_parent()
    log = open(Path(folder) / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    if job.backend == "gloo":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch.distributed as dist

    _use_device(rank, job.backend)
    store = dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
        str(Path(folder) / "store"), job.ranks
    )
    dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.ranks, timeout=_TIMEOUT)
    try:
        _call(job, rank, job.ranks)
    except HeadgridError as error:
        (Path(folder) / f"rank{rank}.error").write_text(json.dumps({"block": error.block(), "code": error.exit_code}))
        raise
    dist.destroy_process_group()
    (Path(folder) / f"rank{rank}.done").touch()


def _preload() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "headgrid.runtime.engine"])
    return context


def run(job: Job, *, on_poll: Callable[[], None] = lambda: None, log_to: Path | None = None) -> None:
    """Start `job.ranks` ranks on this host and wait for them; `on_poll` is called several times a second.

    Whatever happens (a rank dies, Ctrl-C, an error here), no process is left behind. Raises RankDied that names the
    first rank that died, or the rank's own HeadgridError. `log_to` receives the ranks' output.
    """
    context = _preload()
    folder = Path(tempfile.mkdtemp(prefix="headgrid-"))
    ranks = [context.Process(target=_rank_main, args=(r, job, str(folder)), name=f"rank{r}") for r in range(job.ranks)]
    try:
        for process in ranks:
            process.start()
        while any(process.exitcode is None for process in ranks):
            wait([process.sentinel for process in ranks if process.exitcode is None], timeout=0.1)
            _raise_if_dead(ranks, folder, log_to)
            on_poll()
        _raise_if_dead(ranks, folder, log_to)  # the last may have died since the loop looked
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
        if log_to is not None:
            _keep_logs(folder, log_to)
        shutil.rmtree(folder, ignore_errors=True)


def _raise_if_dead(ranks: list[Any], folder: Path, log_to: Path | None) -> None:
    ended = [(r, process) for r, process in enumerate(ranks) if process.exitcode is not None]
    dead = [(r, p) for r, p in ended if p.exitcode or not (folder / f"rank{r}.done").exists()]
    if not dead:
        return
    time.sleep(0.2)  # a rank that fails pulls others down: let the first cause be written
    for r, _ in dead:
        error = folder / f"rank{r}.error"
        if error.exists():
            found = json.loads(error.read_text())
            raise _Reported(found["block"], found["code"])
    r, process = min(dead, key=lambda found: found[1].exitcode)  # killed, or gone without a word, before who lost it
    how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended with code {process.exitcode}"
    how += " before its work was done" if not process.exitcode else ""
    tail = _tail(folder / f"rank{r}.log")
    raise RankDied(
        f"rank {r} of {len(ranks)} {how}",
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
