"""Figures as shares of ceilings: what a phase needs at least at a rate, over the time that it took.

Measured ceilings are those of the calibration that the design declares; the others are the data sheet's, and say so.
With t the time that `ranks` devices took, rates per device, and F of `layout.flops`, B of `layout.reads`:

- mfu of prefill: (F_products + F_attention) at the rate of products, F / (ranks x rate) / t (Chowdhery et al. 2022);
  with FP8 linears F_products count at the rate of FP8.
- floor of prefill: F_products at the rate of products + F_attention at that of attention, over ranks x t.
- bytes of decode: B of the rank that has most to read / bandwidth / TPOT; measured, this is that of copying.

Only the journal, the design in front of it, and a bandwidth are needed. Shares are exact multiples of a run's own
rates, so their intervals are those of the rates; the ceilings' own spread stands beside them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from headgrid.errors import HeadgridError
from headgrid.experiment.records import Record, of_kind
from headgrid.experiment.telemetry import Telemetry
from headgrid.layout.flops import model_attention_flops, model_flops
from headgrid.layout.layout import parse_layout
from headgrid.layout.reads import fullest
from headgrid.spec.calibration import Calibration, from_dict
from headgrid.spec.hardware import Hardware, find_hardware
from headgrid.spec.model import ModelSpec, model_from
from headgrid.spec.workload import Workload

MEASURED, DATA_SHEET = "measured", "data sheet"


@dataclass(frozen=True, slots=True)
class Rates:
    """Ceilings of one device by dtype, and where they come from; None where nothing is known."""

    of: str
    products: Mapping[str, float]
    attention: Mapping[str, float]
    memory_bytes_per_s: float | None
    cache_bytes: int | None = None


def measured_rates(found: Calibration) -> Rates:
    """Medians of what has settled; of products the shape that is fastest."""
    products = {kernel.dtype: found.product(kernel.dtype).flop_per_s.median for kernel in found.products}
    attention = {kernel.dtype: found.attend(kernel.dtype).flop_per_s.median for kernel in found.attention}
    return Rates(MEASURED, products, attention, found.copy_bytes_per_s.median, found.cache_bytes)


def data_sheet_rates(found: Hardware) -> Rates:
    """Peaks, which nothing reaches."""
    return Rates(DATA_SHEET, found.peak_flop_per_s, {}, found.peak_memory_bytes_per_s)


def measured_ceilings(design: Mapping[str, Any], telemetry: Telemetry, gpus: Collection[int]) -> dict[str, float]:
    """The calibration's ceilings of counters, in their units; empty without one.

    NVML's share of DRAM bandwidth is one of the data sheet's, so its ceiling is what reading reached of that. Links:
    the most that a rank sent in any collective that no switch can shorten. Other counters keep the driver's ceilings.
    """
    try:
        found = from_dict(design["calibration"]) if design.get("calibration") else None
    except HeadgridError:  # a check says so
        return {}
    if found is None:
        return {}
    memory, link = max(found.read_bytes_per_s.median, found.copy_bytes_per_s.median), found.link_bytes_per_s
    ceilings = {"read_bytes_per_s": memory}
    if link is not None:
        ceilings |= dict.fromkeys(("sent_bytes_per_s", "nvlink_tx_bytes_per_s", "nvlink_rx_bytes_per_s"), link)
    names = {row["name"] for row in telemetry.sessions[-1].start["gpus"] if row["index"] in gpus}
    if hardware := _data_sheet(names):
        ceilings["dram_bandwidth_percent"] = 100 * memory / hardware.peak_memory_bytes_per_s
    return ceilings


def summarise_ceilings(
    design: Mapping[str, Any], records: Sequence[Record], arms: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """`ceilings` of summary.json; None where no ceiling is known, or the design is one that this version cannot read.

    `arms` are those of the summary. A row of `shares` has the figure as a share of 1 with its interval, `least_s`: the
    time that the batch's prefill or one decode step needs at the ceilings `at`, or `why` there is no figure.
    """
    try:
        model, workload = model_from(design["model"]), Workload(**design["workload"])
        found = from_dict(design["calibration"]) if design.get("calibration") else None
    except (HeadgridError, TypeError, LookupError):
        return None
    hardware = _data_sheet({name for record in of_kind(records, "launch") for name in record["device_names"]})
    known = ([measured_rates(found)] if found else []) + ([data_sheet_rates(hardware)] if hardware else [])
    if not known:
        return None
    shares = [
        {"label": arm["label"], **row}
        for arm in arms
        for rates in known
        for row in _shares(arm, model, workload, rates, design["device"])
    ]
    return {
        "calibration": found and _identity(found, design["calibration"]["sha256"]),
        "data_sheet": hardware and {"name": hardware.name, "source": hardware.source},
        "shares": shares,
    }


def unsettled(found: Mapping[str, Any] | None) -> list[str]:
    """A warning about measured ceilings that still drifted when they were measured, if there are any."""
    names = found["calibration"]["unsettled"] if found and found["calibration"] else []
    if not names:
        return []
    return [f"Ceilings had not settled when they were measured ({', '.join(names)}): shares of them may be off."]


def _identity(found: Calibration, sha256: str) -> dict[str, Any]:
    unsettled = [f"products of {kernel.dtype}" for kernel in found.products if not kernel.flop_per_s.settled]
    unsettled += [f"attention of {kernel.dtype}" for kernel in found.attention if not kernel.flop_per_s.settled]
    unsettled += ["copying"] * (not found.copy_bytes_per_s.settled)
    spreads = {"copying": found.copy_bytes_per_s.spread}
    spreads |= {f"products of {k.dtype}": found.product(k.dtype).flop_per_s.spread for k in found.products}
    spreads |= {f"attention of {k.dtype}": found.attend(k.dtype).flop_per_s.spread for k in found.attention}
    named = {key: getattr(found, key) for key in ("created", "device_name", "ranks")}
    return {**named, "sha256": sha256, "spreads": spreads, "unsettled": list(dict.fromkeys(unsettled))}


def _data_sheet(names: set[str]) -> Hardware | None:
    """Of devices of these names, if they are all of one kind that is known."""
    try:
        return find_hardware(next(iter(names))) if len(names) == 1 else None
    except HeadgridError:
        return None


def _shares(
    arm: Mapping[str, Any], model: ModelSpec, workload: Workload, rates: Rates, device: str
) -> Iterator[dict[str, Any]]:
    layout = parse_layout(arm["layout"])
    linears = "float8" if layout.linears == "fp8" and device == "cuda" else workload.dtype
    for kind, least_s, at in _prefill(model, workload, rates, linears, layout.ranks):
        figure = _scaled(arm["prefill_tokens_per_s"], least_s / (workload.batch * workload.seq))
        yield _row("prefill", kind, rates, least_s, at, figure)
    if rates.memory_bytes_per_s is None or not workload.decode_steps:
        return
    size = _decode_bytes(model, arm["layout"], workload)
    least_s, at = size / rates.memory_bytes_per_s, {"memory": rates.memory_bytes_per_s}
    together = size * (layout.ranks if device == "cpu" else 1)
    cached = rates.cache_bytes is not None and together <= rates.cache_bytes
    why = f"{together / 2**20:.4g} MiB fit the {(rates.cache_bytes or 0) / 2**20:.4g} MiB of cache" if cached else None
    figure = None if cached else _scaled(arm["decode_tokens_per_s"], least_s / workload.batch)
    yield _row("decode", "bytes", rates, least_s, at, figure, why)


def _prefill(
    model: ModelSpec, workload: Workload, rates: Rates, linears: str, ranks: int
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Kind, seconds of the whole batch at the ceilings, and these."""
    products, attention = _prefill_flops(model, workload)
    fast, wide = rates.products.get(linears), rates.products.get(workload.dtype)
    if fast is None or wide is None:
        return
    at = {f"products of {linears}": fast, f"products of {workload.dtype}": wide}
    yield "mfu", (products / fast + attention / wide) / ranks, at
    if (attend := rates.attention.get(workload.dtype)) is not None:
        at = {f"products of {linears}": fast, f"attention of {workload.dtype}": attend}
        yield "floor", (products / fast + attention / attend) / ranks, at


@lru_cache(maxsize=64)  # every arm and twin asks for the same
def _prefill_flops(model: ModelSpec, workload: Workload) -> tuple[int, int]:
    attention = model_attention_flops(model, workload)
    return model_flops(model, workload) - attention, attention


@lru_cache(maxsize=256)
def _decode_bytes(model: ModelSpec, layout: str, workload: Workload) -> float:
    return fullest(model, parse_layout(layout), workload).total_bytes


def _scaled(figure: Mapping[str, Any] | None, factor: float) -> dict[str, Any] | None:
    """A rate's estimate as that of a share; None where the arm shows no times."""
    if figure is None:
        return None
    scaled = {key: figure[key] and figure[key] * factor for key in ("mean", "sd")}
    return {**figure, **scaled, "ci95": figure["ci95"] and [edge * factor for edge in figure["ci95"]]}


def _row(
    phase: str,
    kind: str,
    rates: Rates,
    least_s: float,
    at: dict[str, float],
    figure: dict[str, Any] | None,
    why: str | None = None,
) -> dict[str, Any]:
    return {"phase": phase, "kind": kind, "of": rates.of, "least_s": least_s, "at": at, "share": figure, "why": why}
