"""`headgrid calibrate`: what is asked for, refusals before anything starts, and the ranks' figures as one value."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headgrid import __version__
from headgrid.errors import InvalidInput, NotAvailable
from headgrid.experiment.design import Device
from headgrid.experiment.folder import write_json
from headgrid.experiment.machine import ensure_devices, environment, gpu_rows, look
from headgrid.experiment.progress import Progress
from headgrid.runtime import launch
from headgrid.spec.calibration import Calibration, calibration_of

TARGET = "headgrid.experiment.calibrate_work:run_calibration"
DEFAULT_SECONDS = {"cuda": 3.0, "cpu": 1.0}
LEAST_SECONDS, MOST_SECONDS = 0.05, 60.0
DEFAULT_CPU_RANKS = 2
NEEDED_BYTES = {"cuda": 6 << 30, "cpu": 768 << 20}
"""Of one rank: the largest product, the largest messages with their copies, or two buffers, and the libraries."""
MACHINE = ("platform", "python", "cpu", "cpu_count", "packages", "cuda", "nccl", "environment")
"""What of env.json tells one machine from another: no load, no free memory, no state of the code."""
OF_A_GPU = ("name", "driver", "memory_total_bytes", "power_limit_w", "sm_clock_max_mhz", "ecc")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be measured, and where the result goes."""

    device: Device
    ranks: int
    seconds: float
    out: Path

    @property
    def backend(self) -> str:
        """torch's name of the communication library."""
        return "nccl" if self.device == "cuda" else "gloo"


def make(
    device: str | None, ranks: int | None, seconds: float | None, out: Path | None, started: int | None = None
) -> tuple[Plan, list[str]]:
    """The plan and what the user should know. `started`: ranks that a launcher has started already.

    Raises InvalidInput or NotAvailable before any process starts.
    """
    if device not in (None, "cpu", "cuda"):
        raise InvalidInput(f"device {device!r} is not known", legal=("cpu", "cuda"))
    if started is not None and ranks not in (None, started):
        raise InvalidInput(f"--ranks {ranks}, but the launcher started {started}", legal=("no --ranks",))
    machine = look(started or ranks or DEFAULT_CPU_RANKS, device)  # type: ignore[arg-type]
    count = started or ranks or machine.num_devices
    ensure_devices(machine, count, started=started is not None)
    chosen = DEFAULT_SECONDS[machine.device] if seconds is None else seconds
    if not LEAST_SECONDS <= chosen <= MOST_SECONDS:  # also refuses NaN
        raise InvalidInput(
            f"{chosen:g} seconds for each rate",
            why=f"clocks need seconds to settle; legal are {LEAST_SECONDS:g} to {MOST_SECONDS:g}",
            legal=(f"--seconds {DEFAULT_SECONDS[machine.device]:g}",),
        )
    if machine.free_bytes < NEEDED_BYTES[machine.device]:
        raise NotAvailable(
            f"{machine.free_bytes / 2**30:.2f} GiB are free for each of {count} ranks",
            why=f"a calibration needs {NEEDED_BYTES[machine.device] / 2**30:.2f} GiB on each",
            legal=("fewer --ranks",),
        )
    return Plan(machine.device, count, chosen, _writable(out or _default_out())), list(_notes(machine.device, count))


def _default_out() -> Path:
    return Path("runs") / f"calibration-{datetime.now().strftime('%Y%m%d-%H%M%S')}.json"


def _writable(path: Path) -> Path:
    """The path, if a file can be made there. Nothing is overwritten: runs name calibrations by their content."""
    try:
        if path.exists():
            raise FileExistsError("it exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise InvalidInput(f"cannot write {path}", why=str(error), legal=("another --out FILE",)) from error


def _notes(device: Device, ranks: int) -> list[str]:
    if device == "cuda":
        busy = [n for n, row in enumerate(gpu_rows()) if row["foreign_processes"]]
        return [f"GPU {n} has other processes: its figures may be theirs as well" for n in busy]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [f"{ranks} ranks share {cores} cores: figures are what one gets beside the others"] if ranks > cores else []


def carry_out(plan: Plan, on_progress: Callable[[Progress], None]) -> Calibration:
    """Measure on ranks of this host. Raises RankDied, or what a rank has raised; then nothing is written."""
    with tempfile.TemporaryDirectory(prefix="headgrid-calibrate-") as folder:
        job = _job(plan, folder)
        launch.run(job, on_poll=lambda: _show(Path(folder), on_progress))
        return _written(plan, Path(folder))


def carry_out_joined(plan: Plan) -> Calibration | None:
    """The same inside ranks that torchrun started; None on all but rank 0."""
    rank, _ = launch.torchrun_rank()
    with tempfile.TemporaryDirectory(prefix="headgrid-calibrate-") as folder:
        with launch.joined(plan.backend):
            launch.call(_job(plan, folder))
        return _written(plan, Path(folder)) if rank == 0 else None


def _job(plan: Plan, folder: str) -> launch.Job:
    return launch.Job(TARGET, {"folder": folder, "seconds": plan.seconds}, plan.ranks, plan.backend)


def _show(folder: Path, on_progress: Callable[[Progress], None]) -> None:
    try:
        on_progress(Progress(**json.loads((folder / "progress.json").read_text())))
    except FileNotFoundError:
        return  # ranks are being started


def _written(plan: Plan, folder: Path) -> Calibration:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    machine = machine_of(environment())
    name = machine["cpu"] if plan.device == "cpu" else found["device_name"]
    own = {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "headgrid_version": __version__}
    own |= {"device": plan.device, "ranks": plan.ranks, "seconds": plan.seconds, "environment": machine}
    made = calibration_of({**own, **found, "device_name": name})
    write_json(plan.out, made.to_dict())
    return made


# --- the machine it holds for -----------------------------------------------------------------------------------------


def machine_of(env: dict[str, Any]) -> dict[str, Any]:
    """Of the content of env.json, what a calibration keeps."""
    gpus = [{key: row.get(key) for key in OF_A_GPU} for row in env.get("gpus", ())]
    return {key: env.get(key) for key in MACHINE} | {"gpus": gpus}


def ensure_fits(found: Calibration, device: str, ranks: int, dtypes: list[str], env: dict[str, Any]) -> list[str]:
    """What of this machine is not what was calibrated, as notes.

    Raises InvalidInput where shares would mean nothing: another device, a dtype that was not measured, and on a CPU
    another number of ranks, because these share its cores and its memory.
    """
    now = machine_of(env)
    here = now["cpu"] if device == "cpu" else next((row["name"] for row in now["gpus"]), None)
    command = f"headgrid calibrate --device {device}" + (f" --ranks {ranks}" if device == "cpu" else "")
    if (found.device, found.device_name) != (device, here):
        what = f"the calibration is of {found.device} ({found.device_name}), the run uses {device} ({here})"
        raise InvalidInput(what, command=command)
    if device == "cpu" and found.ranks != ranks:
        raise InvalidInput(
            f"the calibration is of {found.ranks} ranks, the run has {ranks}",
            why="ranks on a CPU share its cores: what one of them reaches depends on their number",
            command=command,
        )
    for dtype in dtypes:
        found.product(dtype)
    if device == "cpu":
        now.pop("gpus")
    return [
        f"calibrated with another {key} than this run's: shares of ceilings are of that machine"
        for key, value in now.items()
        if found.environment.get(key) != value
    ]
