"""Every exchange is exact on every n x m grid of at most 16 ranks, in prefill and in decode, in float64."""

from collections import Counter
from collections.abc import Callable

import pytest
from drawn import ALL_EXCHANGES, degrees, draw_case, features, possible, seeded_case
from halves import Case, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import Ranks

DEFAULT_CASES, FULL_CASES = 250, 20_000
exchanges = pytest.mark.parametrize("exchange", ALL_EXCHANGES)


def check_exact(case: Case, ranks: Ranks) -> None:
    errors = compare(case, ranks)
    assert errors.exact, f"{case.layout}: {errors} of {case}"


@exchanges
def test_every_grid(exchange: str, ranks: Ranks) -> None:
    done: set[tuple[int, int]] = set()
    for n, m in degrees(exchange):
        case = seeded_case(exchange, n, m, decoded=True)
        assert case.workload.decode_steps > 0
        check_exact(case, ranks)
        check_exact(seeded_case(exchange, n, m, is_causal=False), ranks)
        done.add((case.layout.num_head_groups, case.layout.num_dim_slices))
    assert len(done) == (16 if exchange == "none" else 34)  # pairs with n m <= 16: 50 in all


@pytest.mark.timeout(600)
@exchanges
def test_random_shapes(exchange: str, ranks: Ranks, budget: Callable[[int, int], int]) -> None:
    wanted, done = budget(DEFAULT_CASES, FULL_CASES) // len(ALL_EXCHANGES), 0
    seen: Counter[str] = Counter()
    # small grids more often: large ones are slow, and have their share in the test above
    grids = [pair for pair in degrees(exchange) for _ in range(16 // (pair[0] * pair[1]))]

    @settings(
        max_examples=wanted,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal done

        def choose(low: int, high: int) -> int:
            return data.draw(st.integers(low, high))

        n, m = grids[choose(0, len(grids) - 1)]
        case = draw_case(choose, exchange, n, m, is_causal=choose(0, 4) < 4)
        check_exact(case, ranks)
        done += 1
        seen.update(name for name, is_so in features(case).items() if is_so)

    check()
    assert done >= wanted
    assert possible(exchange) == set(seen)
