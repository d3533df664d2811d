"""Two hosts on one machine: network namespaces of one user namespace, a cable between them, a name and address each.

Needs no rights beyond unprivileged user namespaces. Processes, files and clocks are shared; names, interfaces and
addresses are not, so that whatever passes between the hosts goes through the cable and is counted there.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CABLES = ("cable0", "cable1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("first-host", "second-host")
TOOLS = ("unshare", "nsenter", "ip")
SHARED = ("--user", "--mount", "--net", "--uts")
NAME_FILES = {
    "/etc/hosts": "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)),
    "/etc/nsswitch.conf": "hosts: files\n",
}
"""What the hosts know of names: there is no name server on the cable, and each question to one would take seconds."""


class Refused(Exception):
    """This machine does not let us make namespaces."""


@dataclass(frozen=True)
class Host:
    """One of the two: `inside` starts a command there."""

    index: int
    holder: int

    @property
    def inside(self) -> list[str]:
        """What to put before a command to run it on this host."""
        return ["nsenter", "--target", str(self.holder), *SHARED, "--preserve-credentials"]

    @property
    def address(self) -> str:
        return ADDRESSES[self.index]

    def do(self, *command: str) -> str:
        """Run a command here; its output. Raises Refused if it fails."""
        done = subprocess.run([*self.inside, *command], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise Refused(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def processes(self) -> list[int]:
        """What runs here, whoever started it, but for the holder of the namespaces."""
        mine = Path(f"/proc/{self.holder}/ns/net").readlink()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (entry / "ns/net").readlink() == mine and "\nState:\tZ" not in (entry / "status").read_text():
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.holder]

    def clear(self) -> None:
        """Kill all of it."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def sent_bytes(self) -> int:
        """What this host has put on the cable, headers included, by the kernel's count."""
        lines = self.do("cat", "/proc/net/dev").splitlines()
        row = next(line for line in lines if line.strip().startswith(f"{CABLES[self.index]}:"))
        return int(row.split(":")[1].split()[8])

    def start(self, command: Sequence[str], cwd: Path, environment: dict[str, str]) -> "Started":
        """Start a command here in a session of its own, its output in files of `cwd`."""
        out, err = cwd / f"host{self.index}.out", cwd / f"host{self.index}.err"
        inside = [*self.inside, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(inside, env=environment, stdout=stdout, stderr=stderr, start_new_session=True)
        return Started(process, out, err)


@dataclass(frozen=True)
class Started:
    """A command that runs on a host."""

    process: "subprocess.Popen[bytes]"
    out_path: Path
    err_path: Path

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(errors="replace")


def _hold(command: list[str]) -> "subprocess.Popen[bytes]":
    """A process that does nothing but keep namespaces, once it is in them."""
    process = subprocess.Popen([*command, "sh", "-c", "echo; exec sleep 3600"], stdout=-1, stderr=-1)
    assert process.stdout is not None and process.stderr is not None
    if not process.stdout.readline():
        process.wait()
        raise Refused(f"{' '.join(command)}: {process.stderr.read().decode().strip()}")
    return process


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Both hosts, connected; `folder` is for their files. Raises Refused where this machine does not allow it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise Refused(f"there is no {', '.join(missing)} here")
    holders = [_hold(["unshare", "--map-root-user", *SHARED])]
    try:
        first = Host(0, holders[0].pid)
        holders.append(_hold([*first.inside, "unshare", "--net", "--uts"]))
        hosts = first, Host(1, holders[1].pid)
        for place, text in NAME_FILES.items():
            own = folder / Path(place).name
            own.write_text(text)
            first.do("mount", "--bind", str(own), place)
        first.do("ip", "link", "add", CABLES[0], "type", "veth", "peer", "name", CABLES[1])
        first.do("ip", "link", "set", CABLES[1], "netns", str(hosts[1].holder))
        for host in hosts:
            host.do("hostname", NAMES[host.index])
            host.do("ip", "addr", "add", f"{host.address}/24", "dev", CABLES[host.index])
            host.do("ip", "link", "set", "lo", "up")
            host.do("ip", "link", "set", CABLES[host.index], "up")
        try:
            yield hosts
        finally:
            for host in hosts:
                host.clear()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
