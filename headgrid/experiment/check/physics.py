"""Gates of physics and arithmetic for anyone's results: what cannot be true whatever was run.

Bounds are the weakest that hold: causal attention counted half, each byte read once, all devices busy all the time.
Sources: Williams, Waterman, Patterson, "Roofline" (CACM 2009); Little, "A proof for the queuing formula L = lambda W"
(1961); Cohen, "Statistical power analysis" (1988) for d; ceilings with their sources in spec/hardware.toml.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.result import MEMORY, RATES, SHARES, TIMES, ArmResult, Figure, Result
from headgrid.layout.flops import model_flops
from headgrid.spec.hardware import Hardware
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

ROUNDING = 0.02
"""Figures are printed with two digits or more."""
MEASURED_SLACK = 1.05
"""Devices of one kind differ by a few percent in what they reach."""
WIDTH_FACTOR = 1.25
"""An interval printed with one digit is that inexact."""
EFFECT_FACTOR = 1.5
"""So is an effect size that is computed from such intervals."""
GB = 1e9


def linear_flops(model: ModelSpec, workload: Workload) -> int:
    """Operations of a prefill's products with layers' weights: two for each element and token."""
    heads = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    mlp = (3 if model.gated_mlp else 2) * model.mlp_hidden_size
    return 2 * model.num_layers * model.hidden_size * (heads + mlp) * workload.batch * workload.seq


def kv_bytes(model: ModelSpec, workload: Workload) -> int:
    """Bytes of keys and values of all prompts, those behind a window not counted."""
    seen = sum(min(workload.seq, model.window(layer) or workload.seq) for layer in range(model.num_layers))
    return 2 * seen * workload.batch * model.num_kv_heads * model.head_dim * workload.element_bytes


def weight_bytes(model: ModelSpec, workload: Workload) -> int:
    """Bytes of all weights."""
    return model.num_parameters * workload.element_bytes


def step_bytes(model: ModelSpec, workload: Workload) -> int:
    """Bytes that a decode step reads at least: layers' weights in a byte each (as if quantised), and the cache."""
    elements = linear_flops(model, replace(workload, batch=1, seq=1, decode_steps=1, prompt_lengths=())) // 2
    return elements + kv_bytes(model, workload)


def prefill_s(
    model: ModelSpec, workload: Workload, hardware: Hardware, arm: ArmResult, *, measured: bool = False
) -> float | None:
    """Seconds that a prefill of the batch needs at least, at peaks or at the best measured; None if unknown."""
    linear = linear_flops(model, workload)
    rest = max(0, _model_flops(model, workload) - linear)
    dtype, wide = arm.linears or workload.dtype, workload.dtype
    if not measured:
        return (linear / hardware.flop_per_s(dtype) + rest / hardware.flop_per_s(wide)) / arm.devices
    matmul, attention = hardware.measured_matmul_flop_per_s, hardware.measured_attention_flop_per_s
    if dtype not in matmul or wide not in attention:
        return None
    return (linear / matmul[dtype] + rest / attention[wide]) / arm.devices


_model_flops = lru_cache(maxsize=64)(model_flops)  # every arm asks for the same; it walks through the whole batch


def _bases(result: Result) -> tuple[ModelSpec, Workload, Hardware] | None:
    if result.model is None or result.workload is None or result.hardware is None:
        return None
    return result.model, result.workload, result.hardware


# --- roofline and Little's law ---------------------------------------------------------------------------------------


def prefill_roofline(result: Result) -> Outcome:
    """Tokens per second of prefill, and time to the first token, against operations per second."""
    if (bases := _bases(result)) is None:
        return
    model, workload, hardware = bases
    for arm in result.arms:
        one = prefill_s(model, replace(workload, batch=1, prompt_lengths=()), hardware, arm)
        if (ttft := arm.mean("ttft_s")) is not None and one is not None and ttft < one * (1 - ROUNDING):
            what = f"TTFT {ttft * 1e3:.4g} ms, but one prompt of {workload.seq} tokens takes {arm.devices} devices"
            yield Finding("roofline.prefill", arm.label, f"{what} {one * 1e3:.4g} ms at {hardware.name}'s peak")
        if (rate := arm.mean("prefill_tokens_per_s")) is None:
            continue
        taken = workload.batch * workload.seq / rate
        for measured, slack in ((False, 1.0), (True, MEASURED_SLACK)):
            least = prefill_s(model, workload, hardware, arm, measured=measured)
            if least is not None and taken * slack < least:
                what = f"{rate:.4g} tokens/s mean {taken:.4g} s for the batch, {arm.devices} x {hardware.name} need"
                kind = "at the best ever measured on it" if measured else "at their peak"
                yield Finding("roofline.prefill", arm.label, f"{what} {least:.4g} s {kind}")
                break


def decode_roofline(result: Result) -> Outcome:
    """A decode step reads the cache and the weights once, on all devices together."""
    if (bases := _bases(result)) is None:
        return
    model, workload, hardware = bases
    size = step_bytes(model, workload)
    for arm in result.arms:
        bounds = {"their peak": hardware.peak_memory_bytes_per_s}
        if hardware.measured_memory_bytes_per_s:
            bounds["the best ever measured on it"] = hardware.measured_memory_bytes_per_s * MEASURED_SLACK
        if rate := arm.mean("memory_bytes_per_s"):
            bounds["the bandwidth that is stated itself"] = rate * (1 + ROUNDING)
        for metric, taken in _step_times(arm, workload):
            for kind, bandwidth in bounds.items():
                least = size / (arm.devices * bandwidth)
                if taken < least * (1 - ROUNDING):
                    what = (
                        f"{metric} means {taken * 1e3:.4g} ms a step; {size / GB:.4g} GB of KV cache and weights take"
                    )
                    gate = "roofline.bandwidth" if "stated" in kind else "roofline.decode"
                    text = (
                        f"{what} {arm.devices} devices {least * 1e3:.4g} ms at {kind}, {bandwidth / 1e12:.3g} TB/s each"
                    )
                    yield Finding(gate, arm.label, text)


def _step_times(arm: ArmResult, workload: Workload) -> Iterator[tuple[str, float]]:
    if tpot := arm.mean("tpot_s"):
        yield "TPOT", tpot
    if rate := arm.mean("decode_tokens_per_s"):
        yield "decode tokens/s", workload.batch / rate


def little(result: Result) -> Outcome:
    """Decode throughput x time per token = sequences in flight (Little 1961), and so must their ratios be."""
    if result.workload is None:
        return
    batch = result.workload.batch
    known: dict[str, tuple[float, float]] = {}
    for arm in result.arms:
        metric = "decode_tokens_per_s" if "decode_tokens_per_s" in arm.figures else "tokens_per_s"
        rate, tpot = arm.mean(metric), arm.mean("tpot_s")
        if rate is None or tpot is None:
            continue
        known[arm.label] = rate, tpot
        if abs(rate * tpot / batch - 1) > ROUNDING:
            what = (
                f"{metric} {rate:.4g} x TPOT {tpot * 1e3:.4g} ms = {rate * tpot:.4g} sequences, the batch has {batch}"
            )
            yield Finding("little", arm.label, what)
    for (a, (rate_a, tpot_a)), (b, (rate_b, tpot_b)) in itertools.combinations(known.items(), 2):
        if abs(rate_a / rate_b * (tpot_a / tpot_b) - 1) > 2 * ROUNDING:
            what = f"throughputs are as {rate_a / rate_b:.4g}, times per token as 1 to {tpot_b / tpot_a:.4g}"
            yield Finding("little.ratio", f"{a} against {b}", f"{what}: of one batch they must be equal")


def named_phase(result: Result) -> Outcome:
    """Tokens per second of prefill and of decode differ by orders: which one it is has to be said."""
    for arm in result.arms:
        if "tokens_per_s" in arm.figures:
            yield Finding("phase", arm.label, "tokens_per_s is of neither prefill nor decode")


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(result: Result) -> Outcome:
    """Weights and cache against what is stated, and what is stated against what a device has."""
    for arm in result.arms:
        parts = {name: figure.mean for name, figure in arm.figures.items() if name in MEMORY}
        held = max(sum(parts.values()), arm.mean("memory_bytes") or 0.0)
        if result.hardware is not None and held > result.hardware.memory_bytes:
            what = f"{held / GB:.4g} GB on a device of {result.hardware.memory_bytes / GB:.4g} GB"
            yield Finding("memory.capacity", arm.label, what)
        if result.model is not None and result.workload is not None:
            yield from _weights(result.model, result.workload, arm)
            yield from _cache(result, result.model, result.workload, arm, held)


def _weights(model: ModelSpec, workload: Workload, arm: ArmResult) -> Iterator[Finding]:
    stated, whole = arm.mean("parameters_bytes"), weight_bytes(model, workload)
    if stated is None:
        return
    in_fp32 = model.num_parameters * max(4, workload.element_bytes)
    sizes = (
        f"the whole model has {model.num_parameters / 1e9:.3g} G parameters, {whole / GB:.4g} GB in {workload.dtype}"
    )
    if stated > in_fp32 * (1 + ROUNDING):
        yield Finding("memory.parameters", arm.label, f"{stated / GB:.4g} GB of parameters on each device; {sizes}")
    if stated * arm.devices < model.num_parameters * (1 - 5 * ROUNDING):  # a byte each, if they are quantised
        what = f"{arm.devices} x {stated / GB:.4g} GB of parameters do not hold them; {sizes}"
        yield Finding("memory.parameters", arm.label, what)


def _cache(result: Result, model: ModelSpec, workload: Workload, arm: ArmResult, held: float) -> Iterator[Finding]:
    """Only of results that decode: a prefill alone may throw its keys away."""
    if not any(True for _ in _step_times(arm, workload)):
        return
    cache, share = kv_bytes(model, workload), kv_bytes(model, workload) / arm.devices
    sizes = f"{workload.batch} x {workload.seq} tokens have {cache / GB:.4g} GB of keys and values in {workload.dtype}"
    stated = arm.mean("kv_cache_bytes")
    if stated is not None and stated < share * (1 - ROUNDING):
        what = f"{arm.devices} x {stated / GB:.4g} GB of KV cache; {sizes}"
        yield Finding("memory.kv_cache", arm.label, what)
    elif stated is None and 0 < held < share * (1 - ROUNDING):
        what = f"{held / GB:.4g} GB on each of {arm.devices} devices in all; {sizes}, {share / GB:.4g} on each"
        yield Finding("memory.kv_cache", arm.label, what)
    if result.hardware is not None and share > result.hardware.memory_bytes:
        yield Finding("memory.capacity", arm.label, f"{sizes}: more than {arm.devices} devices have")


def memory_totals(result: Result) -> Outcome:
    """The total of all devices is devices x the same parts in every arm."""
    common: set[tuple[str, ...]] | None = None
    told: list[str] = []
    for arm in result.arms:
        total, names = (
            arm.mean("total_memory_bytes"),
            [name for name in (*MEMORY, "memory_bytes") if name in arm.figures],
        )
        if total is None or not names:
            continue
        subsets = [s for k in range(1, len(names) + 1) for s in itertools.combinations(names, k)]
        sums = {subset: arm.devices * sum(arm.figures[name].mean for name in subset) for subset in subsets}
        fits = {subset for subset, size in sums.items() if abs(size / total - 1) <= ROUNDING}
        if not fits:
            yield Finding(
                "memory.total", arm.label, f"{total / GB:.4g} GB in all is {arm.devices} times no sum of its parts"
            )
            return
        told.append(f"{arm.label}: {total / GB:.4g} GB = {arm.devices} x ({' + '.join(min(fits, key=len))})")
        common = fits if common is None else common & fits
    if common is not None and not common:
        yield Finding("memory.total", "totals", f"arms add up different parts: {'; '.join(told)}")


# --- shares, bandwidth, communication --------------------------------------------------------------------------------


def shares(result: Result) -> Outcome:
    """No share is above the whole, no rate above the device's peak, nothing is negative."""
    for arm in result.arms:
        for name, figure in arm.figures.items():
            if figure.mean < 0 or (figure.mean == 0 and name not in SHARES):
                yield Finding("range", arm.label, f"{name} is {figure.mean:g}")
            if name in SHARES and name != "scaling_efficiency" and figure.mean > 1:
                yield Finding("utilization", arm.label, f"{name} is {figure.mean:.1%}")
        if result.hardware is None:
            continue
        peaks = {
            "memory_bytes_per_s": result.hardware.peak_memory_bytes_per_s,
            "link_bytes_per_s": result.hardware.peak_link_bytes_per_s,
        }
        if result.workload is not None:
            peaks["flop_per_s"] = result.hardware.flop_per_s(arm.linears or result.workload.dtype)
        for name, peak in peaks.items():
            if (rate := arm.mean(name)) is not None and rate > peak:
                yield Finding("utilization", arm.label, f"{name} {rate:.4g} on a device whose peak is {peak:.4g}")


def communication(result: Result) -> Outcome:
    """Exposed communication is part of the step, and bytes need time on the link."""
    for arm in result.arms:
        tpot, total = arm.mean("tpot_s"), arm.mean("communication_s")
        if tpot and total and total > tpot * (1 - ROUNDING):
            what = f"{total * 1e3:.4g} ms of communication in a token's {tpot * 1e3:.4g} ms leave nothing for computing"
            yield Finding("communication.share", arm.label, what)
        layers = result.model.num_layers if result.model else 1
        listed = sum(call.time_s * (layers if call.per == "layer" else 1) for call in arm.communication)
        words = " + ".join(
            _in_words(call.collective, call.time_s, layers * (call.per == "layer")) for call in arm.communication
        )
        if tpot and listed > tpot * (1 + ROUNDING):
            what = f"{words} = {listed * 1e3:.4g} ms, TPOT is {tpot * 1e3:.4g} ms"
            yield Finding("communication.sum", arm.label, what)
        elif total and listed and abs(listed / total - 1) > 5 * ROUNDING:
            what = f"{words} = {listed * 1e3:.4g} ms, {total * 1e3:.4g} ms are stated"
            yield Finding("communication.sum", arm.label, what)
        for call in arm.communication:
            if result.hardware is not None and call.bytes_per_rank is not None:
                least = call.bytes_per_rank / result.hardware.peak_link_bytes_per_s
                if call.time_s < least:
                    what = (
                        f"{call.collective} sends {call.bytes_per_rank / GB:.4g} GB in {call.time_s * 1e3:.4g} ms, the"
                    )
                    yield Finding("communication.link", arm.label, f"{what} link needs {least * 1e3:.4g} ms")


def _in_words(name: str, time_s: float, times: int) -> str:
    return (f"{times} layers x " if times else "") + f"{time_s * 1e3:.4g} ms {name}"


# --- statistics ------------------------------------------------------------------------------------------------------


def intervals(result: Result) -> Outcome:
    """An interval holds its mean, and follows from SD and n where both are stated."""
    rows = [(f"{arm.label}, {name}", figure) for arm in result.arms for name, figure in arm.figures.items()]
    rows += [(f"{c.a} over {c.b}", c.ratio) for c in result.comparisons if c.ratio is not None]
    for where, figure in rows:
        if figure.sd is not None and figure.sd < 0:
            yield Finding("interval", where, f"SD {figure.sd:g}")
        if figure.ci95 is None or figure.half is None:
            continue
        low, high = figure.ci95
        if not low <= figure.mean <= high:
            yield Finding("interval", where, f"mean {figure.mean:.6g} is outside its interval {low:.6g} to {high:.6g}")
        implied = replace(figure, sd=None).implied_sd
        if figure.sd is None or implied is None:
            continue
        if not figure.sd / WIDTH_FACTOR <= implied <= figure.sd * WIDTH_FACTOR:
            what = f"half width {figure.half:.4g} with n = {figure.n} means SD {implied:.4g}, stated is {figure.sd:.4g}"
            yield Finding("interval.sd", where, what)


def ratios(result: Result) -> Outcome:
    """A ratio is that of the figures it compares, and its interval is one that theirs allow."""
    for row in result.comparisons:
        pair = _pair(result, row.a, row.b, row.metric) if row.metric else None
        if row.ratio is None or pair is None or not pair[1].mean:
            continue
        where, made = f"{row.a} over {row.b}, {row.metric}", pair[0].mean / pair[1].mean
        if abs(row.ratio.mean / made - 1) > ROUNDING:
            what = f"stated {row.ratio.mean:.4g}, {pair[0].mean:.6g} / {pair[1].mean:.6g} is {made:.4g}"
            yield Finding("ratio", where, what)
        widths = [figure.half / figure.mean for figure in pair if figure.half is not None and figure.mean]
        if row.ratio.half is None or len(widths) < 2:
            continue
        low, high = abs(widths[0] - widths[1]) * made, sum(widths) * made  # fully correlated, fully anticorrelated
        if not low / WIDTH_FACTOR <= row.ratio.half <= high * WIDTH_FACTOR:
            what = f"half width {row.ratio.half:.4g}; those of the arms allow {low:.4g} to {high:.4g}"
            yield Finding("ratio.interval", where, what)


def _pair(result: Result, a: str, b: str, metric: str) -> tuple[Figure, Figure] | None:
    found = [result.arm(label).figures.get(metric) for label in (a, b)]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def effects(result: Result) -> Outcome:
    """Cohen's d against means and SDs (those that intervals imply, too); p against the interval; what n counts."""
    for row in result.comparisons:
        where = f"{row.a} against {row.b}"
        p = row.p_value if row.p_value is not None else row.p_below
        if p is not None and not 0 <= p <= 1:
            yield Finding("statistics.p", where, f"p = {p:g}")
        if row.p_value is not None and row.ratio is not None and row.ratio.ci95 is not None:
            excludes = not row.ratio.ci95[0] <= 1 <= row.ratio.ci95[1]
            if excludes != (row.p_value < 0.05):
                what = f"p = {row.p_value:g}, the 95 % interval {'excludes' if excludes else 'includes'} 1"
                yield Finding("statistics.p", where, what)
        if row.unit == "iteration" and (p is not None or row.cohens_d is not None):
            what = "p and d over iterations of one launch: those are not independent, so p is too small by orders"
            yield Finding("statistics.unit", where, what)
        if row.cohens_d is not None:
            yield from _effect(result, row.a, row.b, row.metric, row.cohens_d, where)


def _effect(result: Result, a: str, b: str, metric: str | None, stated: float, where: str) -> Iterator[Finding | Note]:
    names = [metric] if metric else [*RATES, *TIMES]
    made: dict[str, float] = {}
    for name in names:
        pair = _pair(result, a, b, name)
        if pair is None or pair[0].implied_sd is None or pair[1].implied_sd is None:
            continue
        pooled = math.sqrt((pair[0].implied_sd ** 2 + pair[1].implied_sd ** 2) / 2)
        if pooled:
            made[name] = abs(pair[0].mean - pair[1].mean) / pooled
    if not made:
        yield Note(f"{where}: Cohen's d {stated:g} cannot be made again without SDs, or intervals and n")
    elif not any(d / EFFECT_FACTOR <= abs(stated) <= d * EFFECT_FACTOR for d in made.values()):
        text = ", ".join(f"{d:.3g} for {name}" for name, d in made.items())
        yield Finding("statistics.effect", where, f"Cohen's d is stated as {stated:g}; means and SDs give {text}")


GATES: dict[str, Callable[[Result], Outcome]] = {
    gate.__name__: gate
    for gate in (
        prefill_roofline,
        decode_roofline,
        little,
        named_phase,
        memory,
        memory_totals,
        shares,
        communication,
        intervals,
        ratios,
        effects,
    )
}
"""In the order in which they report."""
