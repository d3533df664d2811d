"""What is timed in a launch: blocks in the declared order, a pilot before the first that counts, and blocks again where
the sentinels say that the machine was another one.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from headgrid.experiment.design import Arm
from headgrid.experiment.pilot import out_of_band, pilot_bands, settle
from headgrid.experiment.sentinel import Sentinels
from headgrid.experiment.sentinel_bands import KINDS
from headgrid.experiment.stopwatch import timed
from headgrid.runtime.engine import Engine

if TYPE_CHECKING:
    from headgrid.experiment.worker import Launch


class Turn(NamedTuple):
    """One turn: Unix time of each phase's barrier, and every rank's seconds."""

    prefill_start_s: float
    prefill_s: list[float]
    decode_start_s: float
    decode_s: list[float]


class Timing:
    """The timed part of one launch on one rank. All ranks do the same: what is decided is rank 0's word."""

    def __init__(
        self, launch: "Launch", engines: Mapping[str, Engine], arms: Sequence[Arm], payload: Mapping[str, Any]
    ) -> None:
        """`arms`: those that are verified; `engines` by layout; `payload` is that of `worker.run_launch`."""
        self._launch, self._engines, self._arms = launch, engines, arms
        self._rule = launch.design.protocol.pilot
        self._done: list[int] = payload["done"]
        self._pilot: Mapping[str, Any] | None = payload.get("pilot")
        self._again: list[int] = list(payload.get("again", ()))
        self._sentinels = Sentinels(launch.device, launch.dtype)
        self._reading: dict[str, list[float]] = {}
        self._warm: list[dict[str, list[float]]] = []

    def run(self) -> dict[str, list[float]]:
        """Every block that is not done yet. The sentinels as they were read behind the last turn."""
        design = self._launch.design
        self._reading = self._sentinels.read()
        for block, order in enumerate(design.order[self._launch.index]):
            if block == design.protocol.warmup_blocks:
                self._ensure_pilot()
            arms = [arm for place in order if (arm := design.arms[place]) in self._arms]
            if arms and block not in self._done:
                self._block(block, arms)
        return self._reading

    def _block(self, block: int, arms: Sequence[Arm]) -> None:
        """All arms; and all of them once more, at once, if a sentinel beside them was out of the pilot's band.

        What the arms took has no part in that.
        """
        read = self._try(block, arms, retry=0)
        self._warm += read[1:] if block < self._launch.design.protocol.warmup_blocks else []
        if self._is_due_again(block, read):
            self._launch.record("rerun", block=block, attempt=self._launch.attempt, sentinels=self._reading)
            self._again.append(block)
            self._reading = self._sentinels.read()
            self._try(block, arms, retry=1)

    def _try(self, block: int, arms: Sequence[Arm], retry: int) -> list[dict[str, list[float]]]:
        """The sentinels as they were read before each arm and behind the last."""
        read = [self._reading]
        for arm in arms:
            self._time(block, arm, retry)
            self._reading = self._sentinels.read()
            read.append(self._reading)
        return read

    def _is_due_again(self, block: int, read: Sequence[Mapping[str, list[float]]]) -> bool:
        protocol = self._launch.design.protocol
        if self._rule is None or self._pilot is None or block < protocol.warmup_blocks or block in self._again:
            return False
        left = len(self._again) < self._rule.reruns(protocol.blocks)
        return self._launch.agreed(left and bool(out_of_band(pilot_bands(self._rule, self._pilot), read)))

    def _ensure_pilot(self) -> None:
        """Turns of the baseline, once in a run. Without a verified baseline there is none, and a block is one turn."""
        launch, rule = self._launch, self._rule
        baseline = next(arm for arm in launch.design.arms if arm.role == "baseline")
        if rule is None or self._pilot or launch.index or self._done or baseline not in self._arms:
            return
        engine, read = self._engines[baseline.layout], self._warm or [self._reading]
        turns = [self._turn(engine)]
        due = rule.turns_due(max(turns[0].prefill_s) + max(turns[0].decode_s), len(read))
        while len(turns) < due:
            read.append(self._sentinels.read())
            turns.append(self._turn(engine))
        read.append(self._sentinels.read())
        times = {phase: [max(getattr(turn, phase)) for turn in turns] for phase in ("prefill_s", "decode_s")}
        sentinels = {kind: [max(reading[kind]) for reading in read] for kind in KINDS}
        pilot: dict[str, Any] = launch.agreed({**times, "sentinels": sentinels, **settle(rule, **times)._asdict()})
        launch.record("pilot", attempt=launch.attempt, arm=baseline.label, **pilot)
        self._pilot = pilot
        self._reading = self._sentinels.read()

    def _turn(self, engine: Engine, planted: float = 0.0) -> Turn:
        """A prefill of the batch, then decode steps on the cache it wrote. No observer, no profiler."""
        launch = self._launch
        steps = launch.design.workload.decode_steps
        prefill = timed(launch.device, lambda: engine.prefill(launch.prompts), planted)
        if planted:  # decode is to find the device as a prefill leaves it, hot and at its limit of power, not rested
            engine.prefill(launch.prompts)
        return Turn(*prefill, *timed(launch.device, lambda: engine.decode(steps), planted))

    def _time(self, block: int, arm: Arm, retry: int) -> None:
        """An arm's turns in a block, one behind the other, and their record."""
        launch, design = self._launch, self._launch.design
        planted = design.protocol.planted if arm.role == "planted" else 0.0
        number = self._pilot["turns"] if self._pilot else 1
        turns = [self._turn(self._engines[arm.layout], planted) for _ in range(number)]
        launch.record(
            "block",
            block=block,
            attempt=launch.attempt,
            position=design.order[launch.index][block].index(design.arms.index(arm)),
            arm=arm.label,
            prefill_start_s=turns[0].prefill_start_s,
            prefill_s=_means([turn.prefill_s for turn in turns]),
            decode_start_s=turns[0].decode_start_s,
            decode_s=_means([turn.decode_s for turn in turns]),
            decode_steps=design.workload.decode_steps,
            warmup=block < design.protocol.warmup_blocks,
            sentinels=self._reading,
            **({"retry": retry, "turns": _columns(turns)} if self._rule else {}),
        )


def _means(times: Sequence[Sequence[float]]) -> list[float]:
    """Of every rank, over the turns."""
    return [round(fmean(rank), 9) for rank in zip(*times, strict=True)]


def _columns(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """Turns as a record has them: starts to the microsecond, seconds of the slowest rank."""
    return {
        "prefill_start_s": [round(turn.prefill_start_s, 6) for turn in turns],
        "prefill_s": [max(turn.prefill_s) for turn in turns],
        "decode_start_s": [round(turn.decode_start_s, 6) for turn in turns],
        "decode_s": [max(turn.decode_s) for turn in turns],
    }
