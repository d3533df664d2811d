"""Ends a rank that a launcher has started when it should end but waits inside a collective.

Python's own handlers of signals do not run there. A rank that is killed closes its connections, which ends the
collectives under way; those that would make new ones, and all where a host is gone without a word (no power, no
network), would wait until their timeout of half an hour. So a rank that is ended says so in the store, and the first
rank of each host looks there. A thread that sleeps in `select` costs the timed ranks nothing; beats are a few messages
every five seconds, from one rank of each host, and only where there are several hosts.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from headgrid.errors import HeadgridError, RankDied
from headgrid.runtime.meeting import Elsewhere, Meeting

BEAT_S, SILENCE_S = 5.0, 60.0
"""How often each host says that it is there, and after what silence another host counts as lost."""
GRACE_S = 2.0
"""How long after a signal Python may take to end a rank by itself."""
LOOK_S = 1.0
INTERRUPTED = 130


class Ended(HeadgridError):
    """This rank was ended by a signal."""

    exit_code = INTERRUPTED


class _Hosts:
    """When each other host was last heard of, by this host's monotonic clock."""

    def __init__(self, meeting: Meeting, others: Sequence[int], beat_s: float) -> None:
        self._meeting, self._beat_s, self._ended = meeting, beat_s, threading.Event()
        self._counts = dict.fromkeys(others, 0)
        self._heard = dict.fromkeys(others, time.monotonic())
        self.failure: tuple[float, Elsewhere] | None = None
        """When this host saw that another rank had ended, and what that one said."""
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        with suppress(Exception):  # the store is gone: then no host is heard of any more
            while not self._ended.wait(self._beat_s if count else 0):
                count += 1
                self._meeting.beat(count)
                if self.failure is None and (found := self._meeting.first_failure()) is not None:
                    self.failure = time.monotonic(), found
                for first, before in self._counts.items():
                    now = self._meeting.beat_of(first)
                    if now != before:
                        self._counts[first], self._heard[first] = now, time.monotonic()

    def silent(self, limit_s: float) -> list[int]:
        """First ranks of hosts that have said nothing for so long."""
        now = time.monotonic()
        return [first for first, heard in self._heard.items() if now - heard > limit_s]

    def end(self) -> None:
        self._ended.set()


@contextmanager
def lifeline(
    meeting: Meeting,
    others: Sequence[int],
    *,
    beat_s: float = BEAT_S,
    silence_s: float = SILENCE_S,
    grace_s: float = GRACE_S,
) -> Iterator[None]:
    """Inside the block this process ends, whatever it waits for, after SIGINT or SIGTERM or the loss of a host.

    `others` are the first ranks of the other hosts; only ranks that are the first of theirs look after them.
    `grace_s`: how long after a signal Python may take to end the process by itself; after another's end twice that.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    hosts = _Hosts(meeting, others, beat_s) if others and meeting.place.local_rank == 0 else None
    before = signal.set_wakeup_fd(write)
    watch = threading.Thread(target=_watch, args=(read, meeting, hosts, silence_s, grace_s), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        watch.join()
        if hosts is not None:
            hosts.end()
        os.close(read)
        os.close(write)


def _watch(read: int, meeting: Meeting, hosts: _Hosts | None, silence_s: float, grace_s: float) -> None:
    while True:
        ready, _, _ = select.select([read], [], [], LOOK_S if hosts is not None else None)
        told = os.read(read, 1) if ready else b""
        if told == b"\0":
            return
        if told and told[0] in (signal.SIGINT, signal.SIGTERM):
            _after_signal(read, meeting, grace_s)
            return
        if hosts is not None:
            _look_at(hosts, silence_s, grace_s, meeting.place.ranks)


def _after_signal(read: int, meeting: Meeting, grace_s: float) -> None:
    """Let Python end the rank, or else end it."""
    ended = Ended("was ended by a signal, its launcher's or a user's")
    threading.Thread(target=_say, args=(meeting, ended), daemon=True).start()  # it waits where the network is gone
    ready, _, _ = select.select([read], [], [], grace_s)
    if not ready or b"\0" not in os.read(read, 64):
        os._exit(INTERRUPTED)


def _say(meeting: Meeting, ended: Ended) -> None:
    with suppress(Exception):
        meeting.leave(ended, lost=True)


def _look_at(hosts: _Hosts, silence_s: float, grace_s: float, ranks: int) -> None:
    """End this process if other ranks have ended and it still waits for them, or if their host is silent."""
    if hosts.failure is not None and time.monotonic() - hosts.failure[0] > 2 * grace_s:
        _end(hosts.failure[1])
    lost = hosts.silent(silence_s)
    if lost:
        _end(
            RankDied(
                f"{len(lost)} other host{'s' * (len(lost) > 1)} of this run said nothing for {silence_s:.0f} s",
                numbers=f"of {ranks} ranks, those of the hosts that begin with rank {', '.join(map(str, lost[:16]))}",
                why="it lost its power or the network, or all its processes were killed",
                command="headgrid compare --resume RUN goes on with a comparison",
            )
        )


def _end(error: HeadgridError) -> None:
    """The last words of a process that cannot be unwound, and its end."""
    os.write(2, f"{error.block()}\n".encode())
    os._exit(error.exit_code)
