"""Carries out a design: its launches one after the other, each on fresh ranks."""

import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from headgrid.errors import InvalidInput
from headgrid.experiment.design import Design
from headgrid.experiment.folder import open_run
from headgrid.experiment.pilot import pilot_of
from headgrid.experiment.records import done_blocks, finished_launches, of_kind, slowest_s
from headgrid.experiment.telemetry import DEFAULT_HZ, Sampler, sampling
from headgrid.runtime import launch

TARGET = "headgrid.experiment.worker:run_launch"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: records of each kind that exist and that will, and the latest one."""

    done: int
    total: int
    latest: str


def carry_out(
    folder: Path,
    on_progress: Callable[[Progress], None],
    telemetry_hz: float = DEFAULT_HZ,
    *,
    breakdown: bool = True,
) -> None:
    """Run every launch that the journal does not show as finished, on ranks of this host.

    Beside them a process samples telemetry `telemetry_hz` times a second (0: none). `breakdown`: behind its blocks each
    launch watches where the arms' steps spend their time.
    """
    design, records = open_run(folder)
    left = sorted({*range(design.protocol.launches)} - {*finished_launches(records)})
    if not left:
        return  # samples of a time after the run would tell of none of its blocks
    with sampling(folder, telemetry_hz, gpus=design.device == "cuda") as sampler:
        for index in left:
            _carry_out_launch(folder, index, on_progress, sampler, breakdown=breakdown)


def carry_out_launch(
    folder: Path, index: int, on_progress: Callable[[Progress], None], telemetry_hz: float = DEFAULT_HZ
) -> None:
    """Run launch `index`, or what the journal lacks of it, as `carry_out` does, without a breakdown."""
    design, records = open_run(folder)
    if index not in finished_launches(records):
        with sampling(folder, telemetry_hz, gpus=design.device == "cuda") as sampler:
            _carry_out_launch(folder, index, on_progress, sampler, breakdown=False)


def _carry_out_launch(
    folder: Path, index: int, on_progress: Callable[[Progress], None], sampler: Sampler | None, *, breakdown: bool
) -> None:
    design, records = open_run(folder)
    watch = _Watch(folder, on_progress, sampler, expected_records(design, breakdown=breakdown))
    payload = _payload(folder, design, records, index) | {"breakdown": breakdown}
    job = launch.Job(TARGET, payload, design.ranks, design.backend)
    launch.run(job, on_poll=watch, log_to=folder / "logs")
    watch()


def carry_out_joined(
    backend: str,
    open_folder: Callable[[], Path],
    telemetry_hz: float = DEFAULT_HZ,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    *,
    breakdown: bool = True,
) -> Path | None:
    """The same inside ranks that torchrun started: one launch, since the processes are given.

    Only rank 0 uses the folder that `open_folder` returns, and gets it back; the others need no common file system.
    Telemetry is that of rank 0's host. `on_progress` is called on rank 0, between what is timed.
    """
    rank, _ = launch.torchrun_rank()
    with launch.joined(backend):
        folder = open_folder() if rank == 0 else None
        if folder is not None and (design := open_run(folder)[0]).backend != backend:
            raise InvalidInput(f"the run in {folder} needs {design.backend}, these ranks have {backend}")
        mine = _next_payload(folder) if folder else None
        shared = launch.share_text(json.dumps(mine and mine | {"breakdown": breakdown}))  # rank 0's flag is all ranks'
        if (payload := json.loads(shared)) is not None:
            with sampling(folder, telemetry_hz, gpus=backend == "nccl") if folder else nullcontext() as sampler:
                if sampler is not None:
                    sampler.follow(child.pid for child in psutil.Process(os.getppid()).children())
                told = _progress_of(folder, on_progress, breakdown) if folder else None
                launch.call(launch.Job(TARGET, payload, payload["design"]["ranks"], backend), told)
    return folder


def _progress_of(folder: Path, report: Callable[[Progress], None], breakdown: bool) -> Callable[[dict[str, Any]], None]:
    """What rank 0 tells of each record that it has written."""
    design, records = open_run(folder)
    written, total = itertools.count(len(records) + 1), expected_records(design, breakdown=breakdown)
    return lambda record: report(Progress(min(next(written), total), total, describe(record)))


def _next_payload(folder: Path) -> dict[str, Any] | None:
    """The first launch that the journal does not show as finished."""
    design, records = open_run(folder)
    unfinished = [i for i in range(design.protocol.launches) if i not in finished_launches(records)]
    return _payload(folder, design, records, unfinished[0]) if unfinished else None


def _payload(folder: Path, design: Design, records: list[dict[str, Any]], index: int) -> dict[str, Any]:
    return {
        "design": design.to_dict(),
        "folder": str(folder.resolve()),
        "launch": index,
        "done": done_blocks(records, index),
        "pilot": pilot_of(records),
        "again": [r["block"] for r in of_kind(records, "rerun") if r["launch"] == index],
        "attempt": sum(record["kind"] == "launch" and record["launch"] == index for record in records),
        "environment_sha256": hashlib.sha256((folder / "env.json").read_bytes()).hexdigest(),
        "started": time.time(),
    }


def expected_records(design: Design, *, breakdown: bool = False) -> int:
    """About how many records the journal of a finished run has, with a breakdown of each arm or without."""
    protocol, arms = design.protocol, len(design.arms)
    pipelines = sum(layout.pp > 1 for layout in design.layouts)
    each = 4 + 2 * breakdown
    launch = arms * (each + protocol.warmup_blocks + protocol.blocks) + 3 + 2 * pipelines
    return protocol.launches * launch + (protocol.pilot is not None)


class _Watch:
    """Follows the journal while ranks write it, and tells the sampler which processes the ranks are."""

    def __init__(self, folder: Path, report: Callable[[Progress], None], sampler: Sampler | None, total: int) -> None:
        self._path, self._report, self._size, self._sampler = folder / "journal.jsonl", report, -1, sampler
        self._total = total

    def __call__(self) -> None:
        if self._sampler is not None:
            self._sampler.follow(child.pid for child in multiprocessing.active_children() if child.pid is not None)
        size = self._path.stat().st_size
        if size != self._size:
            self._size = size
            lines = self._path.read_bytes().splitlines(keepends=True)
            whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
            latest = describe(json.loads(whole[-1])) if whole else "starting ranks"
            self._report(Progress(min(len(whole), self._total), self._total, latest))


def describe(record: dict[str, Any]) -> str:
    """A record in a few words, for the progress line."""
    kind, arm = record["kind"], record.get("arm", "")
    if kind == "block":
        warm = "warm-up " if record["warmup"] else ""
        again = " again" * record.get("retry", 0)
        return f"{warm}block {record['block']}{again}: {arm} {slowest_s(record, 'prefill') or 0:.3g} s"
    if kind == "pilot":
        return f"pilot: {record['turns']} turns a block"
    if kind == "rerun":
        return f"block {record['block']} is run again"
    if kind == "verify":
        return f"{arm}: {'verified' if record['verified'] else 'FAILED: ' + record['reason']}"
    if kind == "control":
        return f"control {record['layout']}: {'rejected' if record['rejected'] else 'NOT REJECTED'}"
    return f"{kind} {arm}".strip()
