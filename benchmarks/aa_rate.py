"""How often does this machine call two copies of one arm different, and how often does it find a planted slow-down?

    python benchmarks/aa_rate.py OUT                                           (a CPU: 2 ranks of the model `tiny`)
    python benchmarks/aa_rate.py OUT --device cuda --ranks 2 --layout tp2 --model seed --batch 2 --seq 1024
    python benchmarks/aa_rate.py OUT --device cuda --ranks 1 --layout tp1 --model seed --batch 2 --seq 1024

One launch runs `--comparisons` times `--blocks` blocks of the baseline, its A/A copy and the planted one, exactly as
`headgrid compare` does, and writes a run folder below OUT. Each so many blocks are then analysed as a run of their own.
A block of each is at least `--block-seconds` long, and at most a quarter of all blocks is run again.
"Called different" is an interval that excludes 1. At most 18 of 200 is the 99 % bound for a true rate of 5 %. As all
are of one launch, nothing here tells what another launch changes. `--again FOLDER` analyses a folder without running.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from headgrid.experiment import folder, machine, plan, runner
from headgrid.experiment.pilot import pilot_of
from headgrid.experiment.records import Phase, Times, block_times, of_kind
from headgrid.experiment.stats import throughput_ratio

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ALLOWED = 0.09
"""18 of 200."""


def parts(times: Times, warmup: int, blocks: int) -> dict[int, Times]:
    """The blocks of each comparison."""
    found: dict[int, dict[Any, float]] = {}
    for key, seconds in times.items():
        found.setdefault((key.block - warmup) // blocks, {})[key] = seconds
    return {number: part for number, part in found.items() if len(part) == blocks}


def excluding(a: dict[int, Times], b: dict[int, Times], analysis: int) -> tuple[int, int]:
    """How many of the comparisons call the two different, and how many there are."""
    intervals = [ratio.ci95 for n in a.keys() & b.keys() if (ratio := throughput_ratio(a[n], b[n], analysis))]
    known = [ci95 for ci95 in intervals if ci95]
    return sum(not low <= 1 <= high for low, high in known), len(known)


def told(run: Path, blocks: int) -> dict[str, Any]:
    """Both rates in both phases, and those of Student's t over the same blocks for comparison."""
    design, records = folder.open_run(run)
    labels = {arm.role: arm.label for arm in design.arms}
    pilot = pilot_of(records)
    found: dict[str, Any] = {"run": str(run), "blocks": blocks, "planted": design.protocol.planted}
    found |= {"turns": pilot["turns"] if pilot else 1, "run_again": len(list(of_kind(records, "rerun")))}
    for phase in PHASES:
        split = {
            role: parts(block_times(records, label, phase), design.protocol.warmup_blocks, blocks)
            for role, label in labels.items()
        }
        row: dict[str, Any] = {}
        for role in ("aa", "planted"):
            called, of = excluding(split[role], split["baseline"], design.protocol.analysis)
            plain, _ = excluding(split[role], split["baseline"], 1)
            row[role] = {"called_different": called, "of": of, "by_student_t": plain}
        found[phase] = row
    within = [found[phase]["aa"]["called_different"] <= ALLOWED * found[phase]["aa"]["of"] for phase in PHASES]
    found["passed"] = all(within)
    return found


def carry_out(options: argparse.Namespace) -> Path:
    """The launch; the folder that it wrote."""
    wishes = plan.Wishes(
        model=options.model,
        arms=(options.layout,),
        ranks=options.ranks,
        batch=options.batch,
        seq=options.seq,
        decode_steps=options.decode_steps,
        blocks=options.comparisons * options.blocks,
        device=options.device,
        seed=options.seed,
        planted=options.planted,
        block_s=options.block_seconds,
        least_ranks=1,
    )
    design, _ = plan.make(wishes)
    run = folder.create(design, machine.environment(), options.out)
    runner.carry_out(run, lambda progress: None, 0.0)
    return run


def main() -> None:
    """Run, or read, and print the rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the run folder")
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each comparison")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layout", default="tp2")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--decode-steps", type=int, default=2)
    parser.add_argument("--planted", type=float, default=0.02)
    parser.add_argument("--block-seconds", type=float, default=0.05, help="as of `headgrid compare`; 0: no pilot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="a run folder to analyse instead")
    options = parser.parse_args()
    run = options.again or carry_out(options)
    print(json.dumps(told(run, options.blocks), indent=1))


if __name__ == "__main__":
    main()
