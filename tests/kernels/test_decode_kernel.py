"""Split-KV decode attention against fp64, with NaN wherever it must not read; by the interpreter and on a GPU."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from frames import assert_frame_whole, framed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgrid.runtime.kernels import split_kv
from headgrid.runtime.kernels.split_kv import LEAST_KEYS, Plan

ERRORS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_ERROR = 2e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Positions of the queries, one for each sequence, and what they see; a part of the keys if stride > 1."""

    positions: tuple[int, ...]
    kv_heads: int = 2
    group: int = 3
    d: int = 24
    u: int = 40
    dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    first: int = 0
    stride: int = 1
    launch: Plan | None = None

    @property
    def lengths(self) -> list[int]:
        """How many keys each sequence has up to its query."""
        return [len(range(self.first, position + 1, self.stride)) for position in self.positions]

    def seen(self, i: int) -> list[int]:
        least = self.positions[i] - self.window + 1 if self.window else 0
        return [t for t in range(self.lengths[i]) if self.first + self.stride * t >= least]


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, and caches with NaN for every key that must not be read."""
    torch.manual_seed(sum(case.positions) + case.d)
    b, capacity = len(case.positions), max(case.lengths) + 3
    q = 2 * torch.randn(b, 1, case.kv_heads * case.group, case.d)
    k, v = (torch.randn(b, capacity, case.kv_heads, width) for width in (case.d, case.u))
    k *= torch.linspace(0.5, 1.5, capacity)[:, None, None]  # later parts weigh more, so that earlier ones must shrink
    for i in range(b):
        hidden = sorted(set(range(capacity)) - set(case.seen(i)))
        k[i, hidden], v[i, hidden] = float("nan"), float("nan")
    q, k, v = (framed(x.to(case.dtype).to(device)) for x in (q, k, v))
    return q, k, v


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [b, 1, H, u] and log-sum-exp [b, 1, H] in fp64, on the CPU."""
    b, _, heads, d = q.shape
    out, lse = torch.zeros(b, 1, heads, case.u).double(), torch.full((b, 1, heads), -math.inf).double()
    for i in range(b):
        keys, values = (x[i, case.seen(i)].double().cpu().repeat_interleave(case.group, 1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", q[i, 0].double().cpu(), keys) * d**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if len(keys):
            lse[i, 0] = torch.logsumexp(scores, -1)
            out[i, 0] = torch.einsum("ht,thu->hu", torch.softmax(scores, -1), values)
    return out, lse


def decoded(case: Case, q: Tensor, k: Tensor, v: Tensor, *, part: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    positions = torch.tensor(case.positions, device=q.device)
    options = {"window": case.window, "softcap": case.softcap, "first": case.first, "stride": case.stride}
    scale = case.d**-0.5
    return split_kv.decode(q, k, v, positions, scale, **options, part=part, out=out, launch=case.launch)


def assert_close(case: Case, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Within the dtype's bound for every sequence, and 0 with -inf exactly where nothing is seen."""
    (out, lse), (wide, sums) = ((x.double().cpu() for x in pair) for pair in (found, expected))
    assert out.shape == wide.shape and lse.shape == sums.shape
    for i in range(len(case.positions)):
        if not case.seen(i):
            assert not out[i].any() and lse[i].isneginf().all(), "nothing is seen"
            continue
        error = float((out[i] - wide[i]).norm() / wide[i].norm())
        assert error < ERRORS[case.dtype], f"relative error {error:.2e} in sequence {i}"
        assert float((lse[i] - sums[i]).abs().max()) < LSE_ERROR * (1 + float(sums[i].abs().max()))


def check(case: Case, device: str, *, part: bool = False, own: bool = False) -> None:
    """Decode, and compare; then the result must be neither of two wrong ones."""
    q, k, v = inputs(case, device)
    dtype = torch.float32 if part else case.dtype
    target = framed(torch.zeros(*q.shape[:3], case.u, dtype=dtype, device=device)) if own else None
    found = decoded(case, q, k, v, part=part, out=target)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    if target is not None:
        assert found[0] is target
        assert_frame_whole(target)
    expected = exact(case, q, k, v)
    assert_close(case, found, expected)
    if max(len(case.seen(i)) for i in range(len(case.positions))) > 1 and case.u > 4:
        values = v.clone()
        for i in range(len(case.positions)):
            values[i, case.seen(i)] = v[i, case.seen(i)].roll(1, 0)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(case, found, exact(case, q, k, values))
        with pytest.raises(AssertionError):
            assert_close(case, (found[0], found[1] + 0.01), expected)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    several = draw(st.booleans())
    launch = Plan(
        splits=draw(st.integers(2, 5)) if several else 1,
        block=draw(st.sampled_from([16, 32, 64])),
        warps=draw(st.sampled_from([2, 4])),
        stages=draw(st.sampled_from([2, 3])),
        columns=draw(st.sampled_from([16, 32, 256])),
        chained=draw(st.booleans()),
    )
    return Case(
        positions=tuple(draw(st.lists(st.integers(0, 300 * stride if several else 90), min_size=1, max_size=2))),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 5, 16, 17])),
        d=draw(st.sampled_from([1, 8, 24, 64])),
        u=draw(st.sampled_from([5, 16, 40])),
        dtype=draw(st.sampled_from(DTYPES)),
        window=draw(st.sampled_from([0, 0, 1, 30, 200])),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        first=draw(st.integers(0, stride - 1)) if stride > 1 else draw(st.sampled_from([0, 0, 20])),
        stride=stride,
        launch=launch if draw(st.integers(0, 3)) else None,
    )


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_any_case_is_as_exact_as_its_dtype_allows(device: str, quick: None, budget: Callable[[int, int], int]) -> None:
    @settings(
        max_examples=budget(40, 2000) if device == "cpu" else budget(15, 200),  # a GPU's are compiled, most of them
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases(), st.booleans(), st.booleans())
    def run(case: Case, part: bool, own: bool) -> None:
        check(case, device, part=part, own=own)

    run()


NAMED = {
    "one key": Case((0,), group=4),
    "one split of several has keys": Case((50, 10), launch=Plan(4, 32, 2, 2)),
    "all splits have keys, the last a few": Case((3 * LEAST_KEYS + 1,), launch=Plan(4, 32, 2, 2)),
    "more splits than are merged at a time": Case((2559,), 1, 1, 8, 256, launch=Plan(40, 64, 2, 2)),
    "ragged beside empty": Case((0, 299), 1, first=1, stride=2, launch=Plan(3, 64, 2, 2)),
    "nothing is seen": Case((3, 2), first=7, stride=9, launch=Plan(2, 16, 2, 2)),
    "nothing is seen of a block that is asked for early": Case(
        (3, 2), first=7, stride=9, launch=Plan(2, 128, 8, 1, 64, chained=True, ahead=128)
    ),
    "a part is not seen of blocks that are asked for early": Case(
        (150, 2), first=2, stride=3, launch=Plan(2, 128, 8, 1, 64, chained=True, ahead=128)
    ),
    "a window across splits": Case((290, 40), 1, window=150, launch=Plan(3, 32, 2, 2)),
    "a window of every third position": Case((290,), 1, window=100, first=1, stride=3, launch=Plan(2, 16, 2, 2)),
    "wide heads": Case((20,), 1, 2, 256, 200, torch.float16),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_cases_at_the_edges(device: str, quick: None, name: str) -> None:
    check(NAMED[name], device, part=True)


def test_no_sequences_give_no_rows(device: str) -> None:
    q, k, v = (torch.empty(0, n, 2, 8, device=device) for n in (1, 30, 30))
    out, lse = split_kv.decode(q, k, v, torch.empty(0, dtype=torch.int64, device=device), 0.3)
    assert out.shape == (0, 1, 2, 8) and lse.shape == (0, 1, 2)


def test_what_is_seen_is_read_so_poison_would_show(device: str) -> None:
    case = Case((200,), launch=Plan(3, 32, 2, 2))
    q, k, v = inputs(case, device)
    for cache, at in ((k, 0), (v, 130), (k, 200)):
        kept = cache[0, at].clone()
        cache[0, at] = float("nan")
        assert decoded(case, q, k, v, part=False, out=None)[0].isnan().any()
        cache[0, at] = kept
    assert not decoded(case, q, k, v, part=False, out=None)[0].isnan().any()


def test_the_same_call_gives_the_same_bits_and_another_launch_does_not(device: str) -> None:
    case = Case((250, 99), dtype=torch.float16, launch=Plan(4, 32, 2, 2))
    q, k, v = inputs(case, device)
    first, again = (decoded(case, q, k, v, part=True, out=None)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, decoded(replace(case, launch=Plan(1, 16, 2, 2)), q, k, v, part=True, out=None)[0])


def test_a_result_of_another_shape_or_dtype_is_refused(device: str) -> None:
    case = Case((5,))
    q, k, v = inputs(case, device)
    good = torch.zeros(1, 1, 6, 40, device=device)
    for bad in (good.half(), good[..., :39], good.transpose(2, 3).contiguous().transpose(2, 3)):
        with pytest.raises(AssertionError):
            decoded(case, q, k, v, part=False, out=bad)
    decoded(case, q, k, v, part=False, out=good)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("chained", [False, True])
def test_one_graph_serves_every_length_with_calls_on_two_streams(
    chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call's result is the next one's query: what starts too early reads what is not written yet."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # no kernels between the calls
    case = Case((0, 0), 2, 4, 64, 64, torch.float16, launch=Plan(30, 32, 2, 3, 32, chained))
    lengths = [(4999, 30), (0, 1), (63, 4000)]
    torch.manual_seed(0)
    q = torch.randn(2, 1, 8, 64, device="cuda").half()
    caches = [tuple(torch.randn(2, 5000, 2, 64, device="cuda").half() for _ in range(2)) for _ in range(4)]
    positions = torch.zeros(2, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()

    def chain(own: list[tuple[Tensor, ...]]) -> Tensor:
        x = q
        for _ in range(6):
            for k, v in own:
                x = split_kv.decode(x, k, v, positions, 4.0, launch=case.launch)[0]
        return x

    def both() -> tuple[Tensor, Tensor]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there = chain(caches[2:])
        here = chain(caches[:2])
        torch.cuda.current_stream().wait_stream(side)
        return here, there

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    seen = []
    for length in lengths * 5:
        positions.copy_(torch.tensor(length))
        graph.replay()
        torch.cuda.synchronize()
        seen.append([x.clone() for x in results])
        alone = []
        for own in (caches[:2], caches[2:]):
            alone.append(chain(own))
            torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(seen[-1], alone, strict=True))
    assert not torch.equal(seen[0][0], seen[2][0]), "the length is read on the device"


PROCESSORS, SHARED_BYTES = 132, 227 << 10


def assert_sound(how: Plan, pairs: int, capacity: int, bytes_per_key: int, shared_bytes: int) -> None:
    """Programs for at least half of the GPU where the keys suffice, no more parts than keys, blocks that fit."""
    assert 1 <= how.splits <= max(1, -(-capacity // LEAST_KEYS)), "splits without keys"
    assert pairs * how.splits >= min(PROCESSORS // 2, pairs * -(-capacity // 200)), "too few programs"
    assert pairs * how.splits <= max(4 * PROCESSORS, pairs), "too many programs"
    assert how.block in (16, 32, 64, 128) and how.warps in (2, 4, 8)
    assert how.stages * how.block * bytes_per_key <= shared_bytes, "blocks do not fit"


@pytest.mark.parametrize("shared_bytes", [99 << 10, SHARED_BYTES])
def test_plans_are_sound(shared_bytes: int) -> None:
    for pairs in (1, 2, 3, 8, 16, 31, 64, 128, 200, 264, 300, 1024, 50_000):
        for group in (1, 2, 8, 16, 32, 71, 128):
            for capacity in (1, 63, 1000, 10_032, 100_032):
                for bytes_per_key in (32, 256, 512, 1024, 2048):
                    how = split_kv.plan(pairs, capacity, group, bytes_per_key, PROCESSORS, shared_bytes)
                    assert_sound(how, pairs, capacity, bytes_per_key, shared_bytes)
    for bad in (Plan(1, 64, 4, 3), Plan(5000, 64, 4, 3), Plan(66, 128, 4, 4)):
        with pytest.raises(AssertionError):
            assert_sound(bad, 1, 10_032, 512, shared_bytes)


def test_the_plans_of_the_measured_cases() -> None:
    """Those of the sweep on an H200, each within 3 % of the best launch of its case."""
    tile = {
        (1, 10_032, 16): (79, 128, 8, 1),
        (32, 10_032, 32): (8, 64, 4, 3),
        (16, 10_032, 16): (16, 32, 2, 4),
        (32, 10_032, 1): (8, 32, 2, 4),
        (64, 10_032, 16): (4, 32, 2, 4),
        (128, 10_032, 8): (2, 32, 2, 4),
        (256, 10_032, 16): (1, 32, 2, 4),
        (1024, 10_032, 4): (1, 32, 2, 4),
        (1, 100_032, 32): (96, 128, 4, 3),
        (4, 100_032, 8): (66, 32, 2, 4),
        (8, 10_032, 32): (16, 128, 4, 3),
    }
    for shape, expected in tile.items():
        how = split_kv.plan(*shape, 512, PROCESSORS)
        assert (how.splits, how.block, how.warps, how.stages) == expected, shape
