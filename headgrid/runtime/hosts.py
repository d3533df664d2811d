"""Which host a process is on, and by which of its network interfaces others reach it."""

import hashlib
import ipaddress
import socket
from pathlib import Path

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Twelve hexadecimal digits: the same for processes of one host, else different. Does not give its name away.

    Containers of one machine count as hosts of their own if they have names of their own, for they may not see each
    other's GPUs or loopback.
    """
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return hashlib.sha256(f"{socket.gethostname()}\0{boot}".encode()).hexdigest()[:12]


def local_address(towards: str, port: int) -> str | None:
    """This host's own address on the way to another host; None if there is no way or the name does not resolve.

    Asks the routing table by connecting a datagram socket: nothing is sent.
    """
    try:
        found = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0]).partition("%")[0]
        except OSError:
            continue
    return None


def is_loopback(address: str) -> bool:
    """Whether it leads back to its own host."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
