"""Carries out a design: its launches one after the other, each on fresh ranks."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from headgrid.experiment.design import Design
from headgrid.experiment.folder import open_run
from headgrid.experiment.pilot import pilot_of
from headgrid.experiment.progress import Progress
from headgrid.experiment.records import done_blocks, finished_launches, of_kind, slowest_s
from headgrid.experiment.starting import HERE, Starter
from headgrid.experiment.telemetry import DEFAULT_HZ, Sampler
from headgrid.runtime import launch

TARGET = "headgrid.experiment.worker:run_launch"


def carry_out(
    folder: Path,
    on_progress: Callable[[Progress], None],
    telemetry_hz: float = DEFAULT_HZ,
    *,
    breakdown: bool = True,
    starter: Starter = HERE,
) -> None:
    """Run every launch that the journal does not show as finished, each on fresh ranks that `starter` starts.

    Beside them a process samples telemetry `telemetry_hz` times a second (0: none). `breakdown`: behind its blocks each
    launch watches where the arms' steps spend their time.
    """
    design, records = open_run(folder)
    left = sorted({*range(design.protocol.launches)} - {*finished_launches(records)})
    if not left:
        return  # samples of a time after the run would tell of none of its blocks
    with starter.sampling(folder, telemetry_hz, gpus=design.device == "cuda", ranks=design.ranks) as sampler:
        for index in left:
            _carry_out_launch(folder, index, on_progress, sampler, starter, breakdown=breakdown)


def carry_out_launch(
    folder: Path,
    index: int,
    on_progress: Callable[[Progress], None],
    telemetry_hz: float = DEFAULT_HZ,
    starter: Starter = HERE,
) -> None:
    """Run launch `index`, or what the journal lacks of it, as `carry_out` does, without a breakdown."""
    design, records = open_run(folder)
    if index not in finished_launches(records):
        with starter.sampling(folder, telemetry_hz, gpus=design.device == "cuda", ranks=design.ranks) as sampler:
            _carry_out_launch(folder, index, on_progress, sampler, starter, breakdown=False)


def _carry_out_launch(
    folder: Path,
    index: int,
    on_progress: Callable[[Progress], None],
    sampler: Sampler | None,
    starter: Starter,
    *,
    breakdown: bool,
) -> None:
    design, records = open_run(folder)
    watch = _Watch(folder, on_progress, sampler, starter.pids, expected_records(design, breakdown=breakdown))
    payload = _payload(folder, design, records, index) | {"breakdown": breakdown}
    job = launch.Job(TARGET, payload, design.ranks, design.backend)
    starter.run(job, on_poll=watch, log_to=folder / "logs")
    watch()


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

    def __init__(
        self,
        folder: Path,
        report: Callable[[Progress], None],
        sampler: Sampler | None,
        pids: Callable[[], Iterable[int]],
        total: int,
    ) -> None:
        self._path, self._report, self._size, self._sampler = folder / "journal.jsonl", report, -1, sampler
        self._total, self._pids = total, pids

    def __call__(self) -> None:
        if self._sampler is not None:
            self._sampler.follow(self._pids())
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
