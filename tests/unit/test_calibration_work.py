"""What is asked of ranks: groups that work side by side, buffers beyond caches, windows without a pause."""

import time
from pathlib import Path

import pytest
import torch

from headgrid.experiment import calibrate_rates
from headgrid.experiment.calibrate_links import questions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 6]), (8, [2, 4, 8]), (12, [2, 4, 12])]
)
def test_groups_of_every_size_hold_each_rank_once(ranks: int, sizes: list[int]) -> None:
    asked = list(questions(ranks))
    assert sorted({question.ranks for question in asked}) == sizes
    for question in asked:
        assert sorted(rank for group in question.groups for rank in group) == list(range(ranks))
        assert {len(group) for group in question.groups} <= {question.ranks, 1}
    kinds = [question.kind for question in asked if question.ranks == ranks]
    assert ranks < 3 or sorted(kinds) == ["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]
    assert [question.kind for question in asked].count("send") == (ranks > 1)


def test_windows_follow_one_another_and_fill_the_time() -> None:
    calls: list[float] = []

    def work() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.004)

    start = time.perf_counter()
    rates = calibrate_rates.sustained(work, 1.0, 0.2, CPU)
    assert time.perf_counter() - start > 0.2 and len(rates) >= 4
    each, rest = divmod(len(calls) - 2, len(rates))  # the first call warms up, the second says how many fill a window
    assert rest == 0 and each >= 1
    windows_s = sum(each / rate for rate in rates)
    assert calls[-1] - calls[2] < windows_s < time.perf_counter() - start  # no gap is left out, none counted twice
    assert all(0 < rate <= 1 / 0.004 for rate in rates)  # never more than the work allows
    assert len(calibrate_rates.sustained(lambda: time.sleep(0.03), 1.0, 0.0, CPU)) == 4


def test_units_scale_a_rate_and_nothing_else() -> None:
    slow = calibrate_rates.sustained(lambda: time.sleep(0.005), 1.0, 0.1, CPU)
    fast = calibrate_rates.sustained(lambda: time.sleep(0.005), 1e9, 0.1, CPU)
    assert 0.3e9 < max(fast) / max(slow) < 3e9


@pytest.mark.parametrize(("text", "size"), [("32K", 32 << 10), ("36M\n", 36 << 20), ("1G", 1 << 30), ("?", 0), ("", 0)])
def test_cache_sizes_as_linux_writes_them(tmp_path: Path, text: str, size: int) -> None:
    (tmp_path / "size").write_text(text)
    assert calibrate_rates._cache_size(tmp_path / "size") == size
    assert calibrate_rates._cache_size(tmp_path / "nowhere") == 0


def test_buffers_lie_beyond_the_cache_and_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache, ranks, size in (
        (None, 2, 64),
        (8 << 20, 2, 64),
        (64 << 20, 2, 128),
        (1 << 30, 2, 256),
        (512 << 20, 16, 128),
    ):
        monkeypatch.setattr(calibrate_rates, "cache_bytes", lambda device, cache=cache: cache)
        assert calibrate_rates.buffer_bytes(CPU, ranks) == size << 20


def test_every_rate_counts_what_its_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate_rates.PRODUCTS, "cpu", ((3, 5, 7),))
    monkeypatch.setitem(calibrate_rates.ATTENTION, "cpu", (2, 16, 8))
    rates = {(rate.name, rate.dtype): rate for rate in calibrate_rates.rates(CPU, 2)}
    product = rates["products", "float32"]
    assert product.units == 2 * 3 * 5 * 7 and product.make()().shape == (3, 7)  # type: ignore[attr-defined]
    attention = rates["attention", "float32"]
    assert attention.units == 2 * 16 * 16 * 8 * 2
    assert attention.make()().shape == (1, 16, 2, 8)  # type: ignore[attr-defined]
    assert rates["copy_bytes_per_s", "float32"].units == 2 * rates["read_bytes_per_s", "float32"].units
