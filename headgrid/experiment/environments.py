"""What the hosts of a run have in common: sentences about where they differ, from env.json alone."""

from collections.abc import Iterator, Mapping
from typing import Any

Environment = Mapping[str, Any]


def differences(env: Environment | None) -> Iterator[str]:
    """One sentence for each host that is not like rank 0's in what may change times or results."""
    first = _compared(env or {})
    for other in (env or {}).get("hosts", ()):
        theirs = _compared(other)
        found = [f"{name} {theirs[name]} instead of {first[name]}" for name in first if theirs[name] != first[name]]
        if found:
            yield f"Host {other['host']} is not like host 0: {'; '.join(found)}."


def _compared(env: Environment) -> dict[str, str]:
    """By name, in words that can be read in a sentence."""
    packages, gpus = env.get("packages") or {}, env.get("gpus") or []
    rows = {
        "headgrid's source": (env.get("source_sha256") or "unknown")[:12],
        "Python": env.get("python"),
        **{name: packages.get(name) for name in ("torch", "triton", "numpy")},
        "CUDA": env.get("cuda"),
        "NCCL": env.get("nccl"),
        "driver": _each(gpus, "driver"),
        "GPUs": _each(gpus, "name"),
        "power limit, W": _each(gpus, "power_limit_w"),
        "CPU": env.get("cpu"),
        "cores": env.get("cpu_count"),
    }
    return {name: "none" if value is None else str(value) for name, value in rows.items()}


def _each(gpus: Any, key: str) -> str:
    return ", ".join(sorted({str(gpu.get(key)) for gpu in gpus})) or "none"
