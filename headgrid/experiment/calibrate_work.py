"""A calibration as every rank runs it: each figure on all ranks at the same time, one figure after the other."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
import torch.distributed as dist

from headgrid.errors import InvalidInput
from headgrid.experiment import calibrate_links, calibrate_rates
from headgrid.experiment.calibrate_fit import measured
from headgrid.experiment.worker import gather_json
from headgrid.runtime.collectives import barrier
from headgrid.runtime.mesh import GroupPool
from headgrid.spec.calibration import Measured

RESULT, PROGRESS = "result.json", "progress.json"
SHORT_S = 0.5
"""Launches and loops load no device that would have to settle."""


class _Rank:
    """This rank's device, and rank 0's way to say how far it is."""

    def __init__(self, rank: int, payload: dict[str, Any], steps: int) -> None:
        self.folder = Path(payload["folder"]) if rank == 0 else None
        self.device = _device()
        self.seconds: float = payload["seconds"]
        self._steps, self._done = steps, 0

    def tell(self, what: str) -> None:
        """Show the next step."""
        if self.folder is not None:
            told = {"done": self._done, "total": self._steps, "latest": what}
            temporary = self.folder / f".{PROGRESS}"
            temporary.write_text(json.dumps(told))
            temporary.rename(self.folder / PROGRESS)
        self._done += 1

    def measure(self, what: str, work: Callable[[], list[float]], *, larger_is_better: bool = True) -> dict[str, Any]:
        """All ranks' windows as one figure, with the clocks at their end."""
        self.tell(what)
        barrier(self.device)
        windows = work()
        mine = {"clock": _asked(torch.cuda.clock_rate, 1.0), "power": _asked(torch.cuda.power_draw, 1e-3)}
        everyone = gather_json({"windows": windows, **mine}, self.device)
        figure: Measured = measured([each["windows"] for each in everyone], larger_is_better=larger_is_better)
        known = {name: tuple(each[name] for each in everyone) for name in ("clock", "power")}
        clock, power = (None if None in known[name] else known[name] for name in ("clock", "power"))
        return asdict(replace(figure, sm_clock_mhz=clock, power_w=power))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _asked(question: Callable[[], Any], factor: float) -> float | None:
    """What this rank's GPU answers right behind its work; None without one, or where its driver does not say."""
    if not torch.cuda.is_initialized():
        return None
    try:
        return question() * factor
    except (RuntimeError, ImportError, pynvml.NVMLError):
        return None


def run_calibration(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Entry point of every rank. `payload`: seconds for each rate, and the folder in which rank 0 leaves the result."""
    device = _device()
    names = gather_json(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", device)
    if len(set(names)) > 1:
        raise InvalidInput(f"ranks have different devices: {', '.join(dict.fromkeys(names))}")
    sustained, asked = list(calibrate_rates.rates(device, ranks)), list(calibrate_links.questions(ranks))
    me = _Rank(rank, payload, len(sustained) + 2 + (device.type == "cuda") + len(asked))
    found: dict[str, Any] = {"device_name": names[0], "cache_bytes": calibrate_rates.cache_bytes(device)}
    with torch.inference_mode():
        found |= _rates(me, sustained) | _host(me)
        pool = GroupPool(rank)
        found["collectives"] = [_collective(me, question, pool) for question in asked]
    me.tell("done")
    if me.folder is not None:
        (me.folder / RESULT).write_text(json.dumps(found, allow_nan=False))


def _rates(me: _Rank, sustained: list[calibrate_rates.Rate]) -> dict[str, Any]:
    kernels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    found: dict[str, Any] = {}
    for rate in sustained:
        what = f"{rate.name.removesuffix('_bytes_per_s')} {rate.dtype} {' x '.join(map(str, rate.shape or ()))}".strip()
        figure = me.measure(what, partial(_sustained, rate, me.seconds, me.device))
        if rate.shape is None:
            found[rate.name] = figure
        else:
            kernels[rate.name].append({"dtype": rate.dtype, "shape": list(rate.shape), "flop_per_s": figure})
    return found | kernels


def _sustained(rate: calibrate_rates.Rate, seconds: float, device: torch.device) -> list[float]:
    return calibrate_rates.sustained(rate.make(), rate.units, seconds, device)


def _host(me: _Rank) -> dict[str, Any]:
    seconds, device = min(SHORT_S, me.seconds), me.device
    eager = me.measure("launches", lambda: calibrate_rates.launches(device, seconds), larger_is_better=False)
    graph = None
    if device.type == "cuda":
        graph = me.measure(
            "launches of a graph", lambda: calibrate_rates.graph_launches(device, seconds), larger_is_better=False
        )
    spin = me.measure("loops of the host", lambda: calibrate_rates.spins(seconds))
    return {"launch_s": eager, "graph_launch_s": graph, "spin_per_s": spin}


def _collective(me: _Rank, question: calibrate_links.Question, pool: GroupPool) -> dict[str, Any]:
    me.tell(f"{question.kind} of {question.ranks} ranks")
    return calibrate_links.answer(question, pool, me.device)
