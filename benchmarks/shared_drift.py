"""Is a drift that all arms share called a difference? Other work grows on the same devices while a comparison runs.

    python benchmarks/shared_drift.py OUT                                       (2 CPU ranks of the model `tiny`)
    python benchmarks/shared_drift.py OUT --device cuda --ranks 2 --layout tp2 --model seed --batch 8 --seq 2000

One process for each device multiplies matrices for a growing share of each 20 ms, from none to `--most`, over
`--ramp-s` seconds from the first block on, while one launch times the baseline, its A/A copy and the planted one.
Printed are how much slower the baseline's last third of blocks was than its first (a drift that is not there proves
nothing), and both ratios: A/A's interval must hold 1, and its value be off by no more than half the drift.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from headgrid.experiment import folder, machine, plan, runner
from headgrid.experiment.records import Phase, block_times
from headgrid.experiment.stats import analysis_of, throughput_ratio

PERIOD_S = 0.02
SIDE = {"cpu": 256, "cuda": 4096}
LEAST_DRIFT = 0.03
"""Of the baseline's own time, from its first third of blocks to its last."""


def disturb(device: str, begin: Any, ramp_s: float, most: float) -> None:
    """Until it is ended: busy for a share of each period that grows from 0 to `most`."""
    torch.set_num_threads(1)
    a = torch.randn(SIDE[torch.device(device).type], SIDE[torch.device(device).type], device=device)
    begin.wait()
    start = time.monotonic()
    while True:
        now = time.monotonic()
        busy_s = PERIOD_S * most * min(1.0, (now - start) / ramp_s)
        while time.monotonic() - now < busy_s:
            (a @ a).sum().item()
        time.sleep(max(1e-4, PERIOD_S - (time.monotonic() - now)))


def carry_out(options: argparse.Namespace) -> Path:
    """The launch beside the growing work; the folder that it wrote."""
    wishes = plan.Wishes(
        model=options.model,
        arms=(options.layout,),
        ranks=options.ranks,
        batch=options.batch,
        seq=options.seq,
        decode_steps=options.decode_steps,
        blocks=options.blocks,
        device=options.device,
        seed=options.seed,
        least_ranks=1,
    )
    design, _ = plan.make(wishes)
    run = folder.create(design, machine.environment(), options.out)
    context = multiprocessing.get_context("spawn")
    begin = context.Event()
    names = [f"cuda:{rank}" if options.device == "cuda" else "cpu" for rank in range(options.ranks)]
    others = [
        context.Process(target=disturb, args=(n, begin, options.ramp_s, options.most), daemon=True) for n in names
    ]
    for other in others:
        other.start()
    try:
        runner.carry_out(run, lambda progress: begin.set() if "block" in progress.latest else None, 0.0)
    finally:
        for other in others:
            other.terminate()
    return run


def told(run: Path) -> dict[str, Any]:
    """The drift, and both ratios, in both phases."""
    design, records = folder.open_run(run)
    labels = {arm.role: arm.label for arm in design.arms}
    found: dict[str, Any] = {"run": str(run)}
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        times = {role: block_times(records, label, phase) for role, label in labels.items()}
        own = [seconds for _, seconds in sorted(times["baseline"].items())]
        third = len(own) // 3
        drift = statistics.mean(own[-third:]) / statistics.mean(own[:third]) - 1
        ratios = {
            role: throughput_ratio(times[role], times["baseline"], analysis_of(design.to_dict()))
            for role in ("aa", "planted")
        }
        aa = ratios["aa"]
        found[phase] = {"drift": drift} | {
            role: ratio and {"ratio": ratio.mean, "ci95": ratio.ci95} for role, ratio in ratios.items()
        }
        inside = aa is not None and aa.ci95 is not None and aa.ci95[0] <= 1 <= aa.ci95[1]
        found[phase]["passed"] = inside and drift >= LEAST_DRIFT and abs(aa.mean - 1) <= drift / 2
    return found


def main() -> None:
    """Run, or read, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the run folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layout", default="tp2")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--ramp-s", type=float, default=20.0)
    parser.add_argument("--most", type=float, default=0.4, help="share of the time that the other work takes at last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="a run folder to read instead")
    options = parser.parse_args()
    print(json.dumps(told(options.again or carry_out(options)), indent=1))


if __name__ == "__main__":
    main()
