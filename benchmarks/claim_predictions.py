"""Times of layouts on GPUs that were not there, from the layouts' operations and bytes and one machine's calibration.

    prefill = (F_products / R_products + F_attention / R_attention) / ranks + sum over calls of (alpha + bytes / beta)
    decode  = bytes of KV cache and weights that the fullest rank reads / bandwidth + sum over calls of the same

R, the bandwidth and the lines alpha + bytes / beta (Hockney 1994) are what `headgrid calibrate` measured among its
GPUs. With pp stages and c calls, prefill's two parts grow by (c + pp - 1) / c: the pipeline fills. Not counted: norms
and other small kernels, gaps, messages between stages (they travel while the stages compute), and that more ranks and a
network between hosts make a collective slower. Weights that are gathered ahead count only as far as they outlast
computing. So the times are short, and the efficiency at more GPUs is rather too high.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from headgrid.layout.batching import prefill_calls
from headgrid.layout.flops import model_attention_flops, model_flops
from headgrid.layout.layout import Coordinates, Layout
from headgrid.layout.reads import decode_reads
from headgrid.layout.traffic import Collective, decode_collectives, prefill_collectives
from headgrid.spec.calibration import read_calibration
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

_BETWEEN_STAGES = ("pp", "pp_back")
_EXCHANGES = ("none", "gather", "batch")
"""`sequence` and `scores` compute and send other things in prefill than is counted here."""


def _first_ranks(layout: Layout) -> list[int]:
    """The first rank of each stage: of balanced shares the first are the largest, and others are like them."""
    return [layout.rank(Coordinates(0, stage, 0, 0)) for stage in range(layout.pp)]


class Predictions:
    """What one calibration says of a model's layouts."""

    def __init__(self, model: ModelSpec, calibration: Path) -> None:
        self._model, self._rates = model, read_calibration(calibration)
        self._slowest = cache(self._exchange)

    def find(self, layout: Layout, workload: Workload, phase: str, part: str) -> tuple[float, str]:
        """One part of a prefill or of a decode step, and how it comes about.

        `part` is `local` (seconds of computing or reading), `exchange` (seconds) or `sent` (the bytes of that).
        Raises ValueError for what is not modelled: other exchanges, and decode in stages.
        """
        if layout.exchange not in _EXCHANGES:
            raise ValueError(f"no prediction of {layout}: its exchange is none of {', '.join(_EXCHANGES)}")
        if phase == "decode" and layout.pp > 1:
            raise ValueError(f"no prediction of {layout} in decode: its stages wait for one another, token by token")
        if part not in ("local", "exchange", "sent"):
            raise ValueError(f"{part!r} is no part of a step")
        local, how = self._compute(layout, workload) if phase == "prefill" else self._read(layout, workload)
        fill, filling = self._fill(layout, workload) if phase == "prefill" else (1.0, "")
        if part == "local":
            return local * fill, how + filling
        exposed, behind, size, how = self._slowest(layout, workload, phase)
        if part == "sent":
            return size, "bytes that a rank sends to those that share its layers"
        return (exposed + max(0.0, behind - local)) * fill, how + filling

    def _compute(self, layout: Layout, workload: Workload) -> tuple[float, str]:
        attention = model_attention_flops(self._model, workload)
        products = model_flops(self._model, workload) - attention
        if layout.exchange == "gather":  # every slice computes whole scores, for its own columns of V
            attention = attention * (layout.num_dim_slices + 1) / 2
        multiply = self._rates.product(workload.dtype).flop_per_s.median
        attend = self._rates.attend(workload.dtype).flop_per_s.median
        how = f"{products:.4g} FLOP at {multiply / 1e12:.4g} TFLOP/s and {attention:.4g} of attention at"
        how += f" {attend / 1e12:.4g}, on {layout.ranks} GPUs"
        return (products / multiply + attention / attend) / layout.ranks, how

    def _read(self, layout: Layout, workload: Workload) -> tuple[float, str]:
        reads = [decode_reads(self._model, layout, workload, rank).total_bytes for rank in _first_ranks(layout)]
        size, rate = max(reads), self._rates.copy_bytes_per_s.median
        return size / rate, f"{size / 1e9:.4g} GB of KV cache and weights at {rate / 1e12:.4g} TB/s"

    @staticmethod
    def _fill(layout: Layout, workload: Workload) -> tuple[float, str]:
        calls = len(prefill_calls(layout, workload, 0))
        if layout.pp == 1:
            return 1.0, ""
        return (calls + layout.pp - 1) / calls, f", x {calls + layout.pp - 1} / {calls} while the pipeline fills"

    def _exchange(self, layout: Layout, workload: Workload, phase: str) -> tuple[float, float, int, str]:
        """Seconds of the rank that waits longest, of what travels while it computes, its bytes, and how they come."""
        issue = prefill_collectives if phase == "prefill" else decode_collectives
        ranks = (issue(self._model, layout, workload, rank) for rank in _first_ranks(layout))
        times = (self._times(layout, phase, calls) for calls in ranks)
        exposed, behind, issued = max(times, key=lambda found: found[0] + found[1])
        size = sum(call.bytes * count for call, count in issued.items())
        how = f"{issued.total()} calls with {size / 1e9:.4g} GB, each alpha + bytes / beta"
        return exposed, behind, size, how + (", all but what outlasts computing hidden" if behind else "")

    def _times(
        self, layout: Layout, phase: str, issued: Counter[Collective]
    ) -> tuple[float, float, Counter[Collective]]:
        counted = Counter({call: n for call, n in issued.items() if call.axis not in _BETWEEN_STAGES})
        ahead = layout.weights == "gathered" and phase == "prefill"
        hidden = {call for call in counted if ahead and call.axis == "tp_slice"}
        times = dict(self._priced(counted))
        behind = sum(times[call] for call in hidden)
        return sum(times.values()) - behind, behind, counted

    def _priced(self, issued: Counter[Collective]) -> Iterator[tuple[Collective, float]]:
        for call, count in issued.items():
            cost = self._rates.cost(call.kind, self._rates.ranks)
            if cost is None:
                raise ValueError(f"{call.kind} was not calibrated")
            yield call, count * cost.time_s(call.bytes)
