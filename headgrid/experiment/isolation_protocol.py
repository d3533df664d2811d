"""Codes that the protocol's own means give: sentinels out of their band, and blocks before a steady state."""

from collections.abc import Iterator

from headgrid.experiment.isolation_evidence import Check, Evidence, Finding
from headgrid.experiment.records import of_kind
from headgrid.experiment.sentinel_bands import outside, readings
from headgrid.experiment.steady import steady_states

_NAMES = {"gemm_s": "the matrix product", "all_reduce_s": "the all-reduce", "host_s": "the host's loop"}


def _sentinel(evidence: Evidence) -> Iterator[Finding]:
    """A reading speaks of the turns on both sides of it."""
    for reading, kind, ratio in outside(list(readings(evidence.records))):
        for block in (reading.before, reading.after):
            if block is not None and not block.get("warmup"):
                text = f"{_NAMES[kind]} beside this block took {ratio:.2f} times its median"
                yield Finding("SENTINEL", "SUSPECT", text, block["launch"], block["block"], block["arm"])


def _not_steady(evidence: Evidence) -> Iterator[Finding]:
    """Blocks before the steady state are named one by one; without one, all of the launch."""
    blocks = of_kind(evidence.records, "block")
    timed = {(record["launch"], record["block"]) for record in blocks if not record.get("warmup")}
    for row in steady_states(evidence.design, evidence.records):
        launch, phase = row["launch"], row["phase"]
        if row["from_block"] is None:
            text = f"no steady state: {phase} times moved by {row['trend']:+.1%} from the first to the last third"
            yield Finding("NOT_STEADY", "SUSPECT", text, launch, phase=phase)
            continue
        for block in sorted(index for at, index in timed if at == launch and index < row["from_block"]):
            text = f"{phase} became steady at block {row['from_block']}, those before took {row['change']:+.1%}"
            yield Finding("NOT_STEADY", "SUSPECT", text, launch, block, phase=phase)


CHECKS = (
    Check({"SENTINEL": "work that is always the same took another time"}, _sentinel, telemetry=False, since=2),
    Check({"NOT_STEADY": "times had not settled"}, _not_steady, telemetry=False, since=2),
)
