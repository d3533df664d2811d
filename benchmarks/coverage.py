"""How often do the intervals hold? Simulated comparisons through the very functions that analyse real ones.

    python benchmarks/coverage.py [--runs 4000]

Each simulated run has two arms whose true throughput ratio is 1.02. The machine's noise is an AR(1) series over the
turns of the arms (`machine`), or the log ratio of each block is one itself (`ratio`, the worse case: what an arm does
in a block bears on what it does in the next). An arm has `turns` turns in a block, of which its time is the mean; one
in all rows but the last two, where a pilot would have put several together. No block is run again here: which one is,
the times of arms have no part in. Beside it there may be an effect of each launch on the ratio, and a drift that both
arms share. Told is the share of 95 % intervals that hold 1.02, and their median width over Student's t.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from headgrid.experiment.confidence import Confidence, confidence_of, of_independent
from headgrid.experiment.records import BlockKey
from headgrid.experiment.stats import log_ratios

RHOS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95)
TRUE = math.log(1.02)
BLOCK_SD, LAUNCH_SD, DRIFT = 0.01, 0.02, 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """Launches, blocks in each, which series has the autocorrelation `rho`, SD of launch effects, drift in a launch,
    an arm's turns in a block.
    """

    launches: int
    blocks: int
    series: str
    rho: float
    launch_sd: float = 0.0
    drift: float = 0.0
    turns: int = 1


def ar1(draw: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """A stationary Gaussian AR(1) series of n values with SD 1."""
    steps = draw.normal(size=n) * math.sqrt(1 - rho**2)
    value, found = draw.normal(), np.empty(n)
    for k in range(n):
        found[k] = value
        value = rho * value + steps[k]
    return found


def logs_of(case: Case, draw: np.random.Generator) -> dict[BlockKey, float]:
    """The log ratios of one simulated run."""
    a: dict[BlockKey, float] = {}
    b: dict[BlockKey, float] = {}
    for launch in range(case.launches):
        effect = draw.normal(0, case.launch_sd) if case.launch_sd else 0.0
        own = ar1(draw, case.blocks, case.rho) * BLOCK_SD if case.series == "ratio" else np.zeros(case.blocks)
        noise = np.zeros(2 * case.blocks)
        if case.series == "machine":
            noise = ar1(draw, noise.size * case.turns, case.rho).reshape(-1, case.turns).mean(1) * BLOCK_SD
        for block in range(case.blocks):
            first = int(draw.integers(2))  # which arm's turn comes first
            turns = [2 * block + first, 2 * block + 1 - first]
            log_a, log_b = (noise[t] + math.log1p(case.drift * t / (2 * case.blocks)) for t in turns)
            a[BlockKey(launch, block)] = math.exp(log_a)
            b[BlockKey(launch, block)] = math.exp(log_b + TRUE + effect + own[block])
    return log_ratios(a, b)


def intervals(case: Case, runs: int, seed: int = 0) -> Iterator[Confidence]:
    """What the analysis makes of simulated runs."""
    draw = np.random.default_rng([seed, case.launches, case.blocks, int(1000 * case.rho), len(case.series)])
    for _ in range(runs):
        confidence = confidence_of(logs_of(case, draw))
        assert confidence is not None
        yield confidence


def coverage(case: Case, runs: int, seed: int = 0) -> float:
    """Share of the 95 % intervals that hold the true ratio."""
    return sum(0.025 <= confidence.below(TRUE) <= 0.975 for confidence in intervals(case, runs, seed)) / runs


def widening(case: Case, runs: int) -> float:
    """Median half width over that of Student's t for the same blocks."""
    draw = np.random.default_rng(1)
    ratios = []
    for _ in range(runs):
        logs = logs_of(case, draw)
        ours, plain = confidence_of(logs), of_independent(list(logs.values()))
        assert ours is not None and plain is not None
        ratios.append((ours.ci95[1] - ours.ci95[0]) / (plain.ci95[1] - plain.ci95[0]))
    return median(ratios)


def table() -> list[tuple[str, list[Case]]]:
    """Rows of what is told: a name, and the case at each rho."""
    rows = []
    for series in ("machine", "ratio"):
        for launches in (5, 10):
            name = f"{launches} launches x 8, {series}, launch effects and drift"
            rows.append((name, [Case(launches, 8, series, rho, LAUNCH_SD, DRIFT) for rho in RHOS]))
        for blocks in (3, 5, 8, 12, 20, 40, 100, 300):
            for drift in (0.0, DRIFT):
                name = f"1 launch x {blocks}, {series}" + ", drift" * (drift > 0)
                rows.append((name, [Case(1, blocks, series, rho, 0.0, drift) for rho in RHOS]))
    for blocks in (8, 20):
        cases = [Case(1, blocks, "machine", rho, 0.0, DRIFT, turns=10) for rho in RHOS]
        rows.append((f"1 launch x {blocks} of 10 turns, machine, drift", cases))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4000)
    runs = parser.parse_args().runs
    sd = math.sqrt(0.05 * 0.95 / runs)
    print(f"{runs} runs a cell: the SD of 95 % is {100 * sd:.2f} points; in brackets widths over Student's t")
    print(f"{'rho':<52}" + "".join(f"{rho:>14}" for rho in RHOS))
    for name, cases in table():
        cells = []
        for case in cases:
            wide = f" ({widening(case, 200):.1f})" if case.launches == 1 else ""
            cells.append(f"{100 * coverage(case, runs):.1f}{wide}")
        print(f"{name:<52}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
