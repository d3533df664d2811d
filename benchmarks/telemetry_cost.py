"""What telemetry costs the run beside it: one launch, pairs of blocks with the sampler running and stopped.

In each pair the order is random; between blocks rank 0 stops (SIGSTOP) or continues (SIGCONT) the side process, so both
halves of a pair run on the same ranks, caches and clocks. The ratio is throughput with over throughput without, its
interval that of blocks of one launch. `--hz 0` compares nothing with nothing: the noise of this comparison itself.

Run: python benchmarks/telemetry_cost.py --pairs 30             (all GPUs, the seed workload; about a minute a pair)
     python benchmarks/telemetry_cost.py --device cpu --ranks 2 --model tiny --batch 4 --seq 64 --layout tp2 --pairs 40
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

from headgrid.experiment import folder, machine, plan, stopwatch, worker
from headgrid.experiment.design import Design, from_dict
from headgrid.experiment.records import BlockKey
from headgrid.experiment.stats import throughput_ratio
from headgrid.experiment.telemetry import FILE, Sampler, check_hz, read
from headgrid.runtime.launch import Job, run

WARMUP_PAIRS = 2
PHASES = ("prefill", "decode")


def measure(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """Entry point of every rank; rank 0 switches the sampler and writes the slowest rank's times."""
    design = from_dict(payload["design"])
    launch = worker.Launch(rank, design, payload)
    engine = launch.engine(design.layouts[0])
    engine.prefill(launch.prompts)
    if design.device == "cuda":
        engine.capture()
    draw, rows = random.Random(design.protocol.seed), []
    for pair in range(-WARMUP_PAIRS, payload["pairs"]):
        for on in draw.sample((True, False), 2):
            if rank == 0 and payload["sampler"]:
                os.kill(payload["sampler"], signal.SIGCONT if on else signal.SIGSTOP)
            _, prefill_s = stopwatch.timed(launch.device, lambda: engine.prefill(launch.prompts))
            _, decode_s = stopwatch.timed(launch.device, lambda: engine.decode(design.workload.decode_steps))
            rows.append({"pair": pair, "on": on, "prefill": max(prefill_s), "decode": max(decode_s)})
    if rank == 0:
        Path(payload["out"]).write_text(json.dumps(rows))


def run_pairs(design: Design, here: Path, hz: float, pairs: int) -> list[dict[str, Any]]:
    """The rows that `measure` writes, beside a sampler that writes to the folder `here`."""
    sampler = Sampler(here / FILE, hz, gpus=design.device == "cuda") if hz else None
    payload = {
        "design": design.to_dict(),
        "folder": str(here),
        "launch": 0,
        "attempt": 0,
        "out": str(here / "rows.json"),
    }
    payload |= {"pairs": pairs, "sampler": sampler.pid if sampler else None}

    def tell() -> None:
        if sampler:
            sampler.follow(child.pid for child in multiprocessing.active_children() if child.pid)

    try:
        run(Job("telemetry_cost:measure", payload, design.ranks, design.backend), on_poll=tell)
    finally:
        if sampler:
            os.kill(sampler.pid, signal.SIGCONT)
            sampler.stop()
    return json.loads((here / "rows.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "device", "dtype", "layout"):
        parser.add_argument(f"--{name}")
    for name in ("ranks", "batch", "seq", "decode_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--hz", type=float, default=10.0)
    asked = vars(parser.parse_args())
    pairs, hz, layout = (asked.pop(name) for name in ("pairs", "hz", "layout"))
    check_hz(hz)
    design, notes = plan.make(plan.Wishes(arms=(layout,) if layout else None, **asked))
    with tempfile.TemporaryDirectory() as out:
        here = folder.create(design, machine.environment(), Path(out))
        rows = run_pairs(design, here, hz, pairs)
        telemetry = read(here / FILE)
    print("\n".join(notes) + "\n" * bool(notes), end="")
    print(
        f"{design.model.name}, {design.layouts[0]}, {design.ranks} ranks on {design.device}, {pairs} pairs at {hz:g} Hz"
    )
    for phase in PHASES:
        times = [
            {BlockKey(0, row["pair"]): row[phase] for row in rows if row["pair"] >= 0 and row["on"] is on}
            for on in (True, False)
        ]
        ratio = throughput_ratio(*times)
        assert ratio is not None
        low, high = ratio.ci95 or (float("nan"), float("nan"))
        mean_s = sum(times[1].values()) / len(times[1])
        print(f"{phase}: throughput with / without {ratio.mean:.4f} [{low:.4f}, {high:.4f}]; {mean_s:.4g} s a block")
    for stop in telemetry.events("stop") if telemetry else ():
        cost_s = stop["cpu_s"] / stop["samples"]
        print(f"sampler: {stop['samples']} samples, {cost_s * 1e6:.0f} us of CPU each: {cost_s * hz:.2%} of a core")


if __name__ == "__main__":
    main()
