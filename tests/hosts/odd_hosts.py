"""What makes one of the two hosts another machine than the other: its own count of CPU time, and a clock set wrong.

Both share a kernel, so each would count the other's ranks as foreign load. A file laid over /proc/stat tells each host
its own story instead; whatever reads it is the code that is tested.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CORES = 2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CLOCK = """
import time
_right = time.time
time.time = lambda: _right() + {ahead_s}
"""
"""Loaded by every Python process of a host before anything else, as `sitecustomize`."""


@contextmanager
def own_cpu(file: Path, busy: float, stolen: float) -> Iterator[list[str]]:
    """What to put before a command, so that in it each core was `busy` and `stolen` for these shares of the time."""
    end, begun = threading.Event(), time.monotonic()
    rest = [line for line in Path("/proc/stat").read_text().splitlines() if not line.startswith(("cpu", "intr"))]

    def text() -> bytes:
        ticks = (time.monotonic() - begun) * TICKS_PER_S
        user, steal, idle = (int(share * ticks) for share in (busy, stolen, 1 - busy - stolen))
        rows = [("cpu", CORES), *((f"cpu{core}", 1) for core in range(CORES))]
        cpus = [f"{name} {n * user:12d} 0 0 {n * idle:12d} 0 0 0 {n * steal:12d} 0 0" for name, n in rows]
        return "\n".join([*cpus, *rest, ""]).encode()

    file.write_bytes(text())
    with open(file, "r+b", buffering=0) as written:

        def write() -> None:
            while not end.wait(0.05):
                os.pwrite(written.fileno(), text(), 0)  # as long as before, in the same file, so never torn

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield ["unshare", "--mount", "sh", "-c", f'mount --bind {file} /proc/stat && exec "$@"', "sh"]
        finally:
            end.set()
            thread.join()


def clock_ahead(folder: Path, ahead_s: float) -> str:
    """What a host needs in PYTHONPATH for its wall clock to be ahead."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK.format(ahead_s=ahead_s))
    return str(folder)
