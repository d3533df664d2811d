"""Starts ranks on this host and looks after them, or joins those that torchrun started.

The only place that reads or sets environment variables. Ranks come from a fork server that has torch loaded: 16 start
in about a second, against a minute by spawning. They meet through a file, so no port is opened, and gloo is bound to
the loopback interface.
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


@contextmanager
def joined(backend: str) -> Iterator[None]:
    """The default process group of ranks that torchrun started, for the length of the block."""
    import torch.distributed as dist

    rank, _ = torchrun_rank()
    _use_device(int(os.environ.get("LOCAL_RANK", rank)), backend)
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


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
