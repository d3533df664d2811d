"""torchrun on two hosts of this machine, and what comes of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from two_hosts import Host, Started

HERE = Path(__file__).parent
SMALL = ("--model", "tiny", "--batch", "4", "--seq", "16", "--decode-steps", "2", "--device", "cpu")
LIMIT_S = 240
"""For whatever must end: many times what it takes on an idle machine."""


@dataclass
class Cluster:
    """Both hosts, with a folder each."""

    hosts: tuple[Host, Host]
    folders: tuple[Path, Path]
    before: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """What is put before each host's commands."""
    paths: list[str] = field(default_factory=lambda: ["", ""])
    """What each host's Python looks for modules in, first of all."""

    def torchrun(self, *command: str, ranks: int = 2, port: int, only: Sequence[int] = (0, 1)) -> list[Started]:
        """The same command on each host, by static rendezvous at the first one's address."""
        first = ("--master-addr", self.hosts[0].address, "--master-port", str(port))
        return [self.start(index, "--nproc-per-node", str(ranks), *first, *command) for index in only]

    def start(self, index: int, *command: str) -> Started:
        """torchrun on one host."""
        head = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(index))
        environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
        paths = filter(None, (self.paths[index], str(HERE.parent.parent), str(HERE)))
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}
        return self.hosts[index].start([*self.before[index], *head, *command], self.folders[index], environment)

    def left(self) -> list[int]:
        """Processes on either host."""
        return [pid for host in self.hosts for pid in host.processes()]

    def settled(self) -> bool:
        """Whether nothing runs any more; waits a moment for what is about to end."""
        return eventually(lambda: not self.left(), 20)


def eventually(happened: Callable[[], object], timeout_s: float = LIMIT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ended(started: Sequence[Started]) -> list[int]:
    """Exit codes, once all have ended."""
    return [each.process.wait(LIMIT_S) for each in started]


def journal(folder: Path) -> list[dict]:
    path = next(iter(folder.glob("runs/*/journal.jsonl")), None)
    lines = path.read_text().splitlines(keepends=True) if path is not None else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check(run: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "headgrid", "check", str(run)], capture_output=True, text=True)
