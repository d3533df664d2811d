"""What the ranks of test_launch.py run. Each first leaves its process id where the test finds it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from headgrid.errors import InvalidInput


def _arrive(rank: int, payload: dict[str, Any]) -> None:
    """Leave the process id, whole at once, and wait until all ranks have."""
    part = Path(payload["folder"]) / f".{rank}"
    part.write_text(str(os.getpid()))
    part.rename(part.with_name(f"{rank}.pid"))
    dist.barrier()


def succeed(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    _arrive(rank, payload)
    print(f"rank {rank} of {ranks} says {payload['word']}")


def wait_for_the_others(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Rank 0 never comes: the others are blocked inside a collective, in C++."""
    _arrive(rank, payload)
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def raise_in_rank_1(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    _arrive(rank, payload)
    if rank == 1:
        raise ZeroDivisionError("the cause that must be told")
    dist.barrier()


def refuse_in_rank_1(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    _arrive(rank, payload)
    if rank == 1:
        raise InvalidInput("the flux is off", numbers="88 < 1.21", legal=("on",))
    dist.barrier()


def kill_rank_2(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    _arrive(rank, payload)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_in_rank_0(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Ends with code 0, but without having finished: the others would wait for ever."""
    _arrive(rank, payload)
    if rank == 0:
        os._exit(0)
    dist.barrier()


def die_together(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """All ranks end once the supervisor has looked away."""
    _arrive(rank, payload)
    while not (Path(payload["folder"]) / "away").exists():
        time.sleep(0.01)
    os._exit(3)
