"""Fused norms, cache writes, rotary turns and gates against their formulas in fp64, within one rounding.

Operands stand in the middle of NaN, and so do results; what lies around them must stay as it was.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from frames import UNIT, assert_frame_whole, assert_rounded_once, framed
from torch import Tensor

from headgrid.runtime.kernels import fused
from headgrid.spec.model import find_model

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"fp16": (F16, F16), "bf16": (BF16, BF16), "fp32": (F32, F32), "wide residual": (F32, F16)}
SEED = find_model("seed")


def rows_in_nan(count: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Dense rows [count, width] with a row of NaN on either side."""
    buffer = torch.full((count + 2, width), math.nan, dtype=dtype, device=device)
    rows = buffer[1 : count + 1]
    return rows.copy_(torch.randn(count, width) * 2 + 0.5)


@dataclass(frozen=True)
class Norm:
    rms: bool = False
    unit: bool = False
    shifted: bool = False

    def exact(self, x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
        x, weight = x.double().cpu(), weight.double().cpu()
        if not self.rms:
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + SEED.norm_eps)
        x = x * (weight + 1 if self.unit else weight)
        return x if shift is None else x + shift.double().cpu()


NORMS = {"layer": Norm(shifted=True), "unbiased": Norm(), "rms": Norm(True), "gemma": Norm(True, unit=True)}


@pytest.mark.parametrize("width", [1, 8, 300, 1024, 1500])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_sum_and_its_norm_are_rounded_once(device: str, norm: str, dtypes: str, width: int) -> None:
    torch.manual_seed(width)
    kind, (dtype, to) = NORMS[norm], DTYPES[dtypes]
    model = replace(SEED, norm="rms" if kind.rms else "layer", norm_unit_offset=kind.unit)
    x, y = rows_in_nan(5, width, dtype, device), rows_in_nan(5, width, to, device)
    weight = torch.randn(width).to(to).to(device)
    shift = torch.randn(width).to(to).to(device) if kind.shifted else None
    before = x.clone()
    out = fused.add_norm(x, None, (weight, shift), model, to)
    assert out.dtype == to and torch.equal(x, before)
    assert_rounded_once(out, kind.exact(x, weight, shift), scale=30)
    out = fused.add_norm(x, y, (weight, shift), model, to)
    assert_rounded_once(x, before.double() + y.double(), scale=5)
    assert_rounded_once(out, kind.exact(x, weight, shift), scale=30)
    assert_frame_whole(x)
    if width < 8:
        return
    other = next(n for n in NORMS.values() if n.rms != kind.rms)
    for wrong in (
        kind.exact(before, weight, shift),
        other.exact(x, weight, shift),
        replace(kind, unit=not kind.unit).exact(x, weight, shift),
    ):
        with pytest.raises(AssertionError, match="times what is allowed"):
            assert_rounded_once(out, wrong, scale=30)


def test_a_norm_rounded_twice_or_read_past_its_row_is_found(device: str) -> None:
    torch.manual_seed(0)
    x, weight = rows_in_nan(4, 300, F16, device), torch.randn(300).half().to(device)
    expected = NORMS["unbiased"].exact(x, weight, None)
    out = fused.add_norm(x, None, (weight, None), SEED, F16)
    assert_rounded_once(out, expected, scale=30)
    with pytest.raises(AssertionError, match="times what is allowed"):
        assert_rounded_once(out.bfloat16().half(), expected, scale=30)
    with pytest.raises(AssertionError, match="not a number"):
        assert_rounded_once(torch.where(torch.arange(300, device=device) == 299, math.nan, out), expected, scale=30)
    x._base[0, 0] = 0  # type: ignore[index]
    with pytest.raises(AssertionError, match="outside"):
        assert_frame_whole(x)


def test_no_rows_and_no_queries_are_no_work(device: str) -> None:
    none = torch.empty(0, 16, device=device)
    assert fused.add_norm(none, none, (torch.ones(16, device=device), None), SEED, F16).shape == (0, 16)
    assert fused.gate(torch.empty(0, 16, device=device), "silu").shape == (0, 8)
    empty, starts = torch.empty(2, 0, 3, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    cache = torch.empty(2, 4, 3, 8, device=device)
    fused.store(empty, empty, (cache, cache), starts)
    fused.rotate(empty, none, none, starts)
    assert cache.isnan().all()
    cells = torch.zeros(2, 1, 3, 8, device=device)
    fused.store(cells, cells, (cache[:, :0], cache[:, :0]), starts)
    assert cache.isnan().all(), "a rank may keep no position"


@dataclass(frozen=True)
class Cells:
    """A prefill or decode step: `s` queries of each sequence from `starts` on, and a cache of some positions."""

    starts: tuple[int, ...]
    s: int = 1
    kv_heads: int = 3
    d: int = 24
    u: int = 40
    first: int = 0
    stride: int = 1
    capacity: int = 12


def projections(
    b: int, s: int, widths: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, list[Tensor]]:
    """The product [b, s, sum of widths] and the views of its columns, as the runtime takes Q, K and V from it."""
    flat = framed(torch.randn(b, s, sum(widths)).to(dtype).to(device))
    return flat, list(flat.split(widths, dim=-1))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    "cells",
    [
        Cells((0, 7, 3)),
        Cells((0, 0), s=9),
        Cells((4, 11), s=3),
        Cells((0, 5, 6, 7), first=1, stride=3),
        Cells((0, 2), s=13, first=2, stride=4, capacity=3),
        Cells((0, 3), s=7, first=5, stride=4),
        Cells((12, 30, 11)),
        Cells((0, 1), s=2, kv_heads=1, d=300, u=5),
    ],
    ids=str,
)
def test_keys_and_values_go_to_their_slots_and_nothing_else_is_written(
    device: str, cells: Cells, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(1)
    b, kv, (d, u) = len(cells.starts), cells.kv_heads, (cells.d, cells.u)
    _, (_, k, v) = projections(b, cells.s, (2 * kv * d, kv * d, kv * u), dtype, device)
    k, v = k.unflatten(-1, (kv, d)), v.unflatten(-1, (kv, u))
    arena = [torch.full((b + 2, cells.capacity + 2, kv, w), math.nan, dtype=dtype, device=device) for w in (d, u)]
    expected = [x.clone() for x in arena]
    for i, start in enumerate(cells.starts):
        for q in range(cells.s):
            slot, rest = divmod(start + q - cells.first, cells.stride)
            if 0 <= slot < cells.capacity and not rest:
                for into, new in zip(expected, (k, v), strict=True):
                    into[i + 1, slot + 1] = new[i, q]
    caches = tuple(x[1 : b + 1, 1 : cells.capacity + 1] for x in arena)
    starts = torch.tensor(cells.starts, device=device)
    fused.store(k, v, caches, starts, first=cells.first, stride=cells.stride)
    for found, wanted in zip(arena, expected, strict=True):
        assert torch.equal(found.nan_to_num(nan=9e4), wanted.nan_to_num(nan=9e4))
        assert not torch.equal(found.nan_to_num(nan=9e4), wanted.roll(1, 1).nan_to_num(nan=9e4)) or wanted.isnan().all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("heads", "width", "pairs", "s", "starts"),
    [
        (5, 16, 8, 3, (0, 4)),
        (3, 20, 6, 1, (7, 0, 2)),
        (40, 128, 64, 1, (9,)),
        (2, 10, 1, 2, (3,)),
        (1, 64, 32, 4, (5,)),
    ],
)
def test_channel_pairs_are_turned_in_place(
    device: str, heads: int, width: int, pairs: int, s: int, starts: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    flat, (x, _) = projections(len(starts), s, (heads * width, 24), dtype, device)
    x = x.unflatten(-1, (heads, width))
    angles = torch.rand(max(starts) + s, 1, pairs) * 6.28
    cos, sin = (f(angles).to(device) for f in (torch.cos, torch.sin))
    before, flat_before = x.double().cpu(), flat.clone()
    a, b = before[..., :pairs], before[..., pairs : 2 * pairs]
    at = torch.tensor(starts)[:, None] + torch.arange(s)
    c, d = (table.double().cpu()[at] for table in (cos, sin))
    expected = torch.cat([a * c - b * d, b * c + a * d, before[..., 2 * pairs :]], dim=-1)
    fused.rotate(x, cos, sin, torch.tensor(starts, device=device))
    assert_rounded_once(x, expected, scale=4)
    assert torch.equal(flat[..., heads * width :], flat_before[..., heads * width :])
    assert_frame_whole(flat)
    turned_back = torch.cat([a * c + b * d, b * c - a * d, before[..., 2 * pairs :]], dim=-1)
    neighbours = before.clone()  # pairs (2 c, 2 c + 1), as other models have them
    a, b = before[..., 0 : 2 * pairs : 2], before[..., 1 : 2 * pairs : 2]
    neighbours[..., 0 : 2 * pairs : 2], neighbours[..., 1 : 2 * pairs : 2] = a * c - b * d, b * c + a * d
    for wrong in (before, turned_back, *([neighbours] if pairs > 1 else [])):
        with pytest.raises(AssertionError, match="times what is allowed"):
            assert_rounded_once(x, wrong, scale=4)


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's sigmoid of large numbers
@pytest.mark.parametrize("units", [1, 300, 2150])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_gate_takes_the_place_of_its_own_half(device: str, kind: str, dtype: torch.dtype, units: int) -> None:
    torch.manual_seed(3)
    x = rows_in_nan(3, 2 * units, dtype, device)
    x[0, 0], x[1, 0] = 12.0, -12.0
    before = x.clone()
    gate, up = before.double().cpu().split(units, dim=-1)
    expected = {name: activation(gate) * up for name, activation in ACTIVATIONS.items()}
    out = fused.gate(x, kind)
    assert out.data_ptr() == x.data_ptr() and out.shape == (3, units)
    assert_rounded_once(out, expected[kind], scale=60)
    assert torch.equal(x[:, units:], before[:, units:]), "up is left as it was"
    assert_frame_whole(x)
    for name in expected:
        close = {name, kind} == {"gelu", "gelu_tanh"} and dtype == BF16  # differ by less than bf16 shows
        if name != kind and units > 1 and not close:
            with pytest.raises(AssertionError, match="times what is allowed"):
                assert_rounded_once(out, expected[name], scale=60)


def test_the_unit_of_rounding_is_that_of_torch() -> None:
    for dtype, unit in UNIT.items():
        assert unit == torch.finfo(dtype).eps / 2
