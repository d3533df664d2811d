"""What this machine is and has: devices, free memory, versions. Read before any rank starts; uses no GPU memory."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from headgrid.errors import NotAvailable
from headgrid.experiment.design import Device
from headgrid.runtime.launch import machine_environment, ranks_here

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "triton",
    "transformers",
    "safetensors",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices that ranks can use: `free_bytes` is what one rank may allocate."""

    device: Device
    num_devices: int
    free_bytes: int


def look(ranks: int | None, device: Device | None) -> Machine:
    """GPUs if there are any (or `device` says so), else this host's CPU, whose free memory its ranks share."""
    import torch

    gpus = torch.cuda.device_count()
    if device == "cpu" or (device is None and not gpus):
        count = ranks or 16
        return Machine("cpu", count, psutil.virtual_memory().available // ranks_here(count))
    return Machine("cuda", gpus, min((row["memory_free_bytes"] for row in gpu_rows()), default=0))


def ensure_devices(machine: Machine, ranks: int, *, started: bool) -> None:
    """Raise NotAvailable if there are too few GPUs; ranks that a launcher has `started` may be on other hosts too."""
    if machine.device == "cuda" and not machine.num_devices:
        raise NotAvailable("there is no CUDA GPU on this host", legal=("--device cpu",))
    if machine.device == "cuda" and not started and ranks > machine.num_devices:
        raise NotAvailable(
            f"{ranks} ranks need {ranks} GPUs and there are {machine.num_devices}",
            legal=(f"--ranks {machine.num_devices}", "--device cpu"),
        )


def backend(device: str | None) -> str:
    """What ranks of this host communicate with, before a design says it."""
    import torch

    return "nccl" if torch.cuda.device_count() and device != "cpu" else "gloo"


def source_sha256() -> str:
    """Hash of headgrid's own source files: ties a run to a state of the code where there is no checkout."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".toml", ".j2", ".js"):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def gpu_rows() -> list[dict[str, Any]]:
    """Name, driver, memory, power limit and clocks of every GPU, by NVML; empty without one."""
    return _of_gpus(_gpu_row)


def compute_capabilities() -> list[tuple[int, int]]:
    """CUDA compute capability of every GPU, by NVML; empty without one."""
    import pynvml

    return [(major, minor) for major, minor in _of_gpus(pynvml.nvmlDeviceGetCudaComputeCapability)]


def _of_gpus(question: Callable[[Any], Any]) -> list[Any]:
    """The answer to an NVML question of every GPU; empty without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [question(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _gpu_row(handle: Any) -> dict[str, Any]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "memory_total_bytes": int(memory.total),
        "memory_free_bytes": int(memory.free),
        "power_limit_w": _asked(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
        "sm_clock_max_mhz": _asked(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "ecc": _asked(lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0])),
        "foreign_processes": _asked(lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }


def _asked(question: Any) -> Any:
    """The answer, or None where this driver has none."""
    import pynvml

    try:
        return question()
    except pynvml.NVMLError:
        return None


def environment() -> dict[str, Any]:
    """The content of env.json."""
    import torch

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(psutil.getloadavg()),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "nccl": _version("nvidia-nccl-cu13") or _version("nvidia-nccl-cu12"),
        "gpus": gpu_rows(),
        "environment": machine_environment(),
        "git": _git(),
        "source_sha256": source_sha256(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git() -> dict[str, Any] | None:
    """Commit and whether the source tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())} if commit.returncode == 0 else None
    )
