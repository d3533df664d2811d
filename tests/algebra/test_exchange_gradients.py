"""Gradients through every exchange: those of the single-device reference, and the slope of what is computed."""

from dataclasses import replace

import pytest
import torch
from drawn import ALL_EXCHANGES, degrees, seeded_case
from gradients import EXACT, Numbers, compare, numbers, predicted_slope, simulate, trainable
from halves import Case
from simulated import Ranks

MAX_RANKS = 8
OPTIONS = [{}, {"residual": "sharded"}, {"output": "concat"}]
FEATURES = {"qk_norm": True, "linear_bias": ("qkv", "o", "mlp")}
exchanges = pytest.mark.parametrize("exchange", ALL_EXCHANGES)


def cases(exchange: str) -> list[Case]:
    """Every grid with every option; shapes are drawn, a third of them bidirectional."""
    found = []
    for n, m in degrees(exchange, MAX_RANKS):
        for k, options in enumerate(OPTIONS if n * m > 1 else OPTIONS[:1]):
            case = seeded_case(exchange, n, m, is_causal=(n + m + k) % 3 > 0)
            case = trainable(case, **options)
            found.append(replace(case, model=replace(case.model, **FEATURES)) if k != 1 else case)
    return found


@exchanges
def test_against_the_reference(exchange: str, ranks: Ranks) -> None:
    wrong = {}
    for case in cases(exchange):
        errors = compare(case, ranks)
        assert {"x", "layers.0.attention.qkv.weight", "layers.0.attention.o.weight"} < set(errors)
        wrong |= {f"{case} {name}": error for name, error in errors.items() if not error <= EXACT}
    assert wrong == {}
    assert len(cases(exchange)) == (22 if exchange == "none" else 36)


def slope(case: Case, given: Numbers, direction: Numbers, ranks: Ranks, step: float = 1e-3) -> float:
    """The change of the inner product along a direction, by central differences of fourth order."""

    def at(t: float) -> float:
        weights = {name: tensor + t * direction.weights[name] for name, tensor in given.weights.items()}
        return simulate(case, Numbers(weights, given.x + t * direction.x, given.upstream), ranks)[0]

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@exchanges
def test_against_differences(exchange: str, options: dict[str, str], ranks: Ranks) -> None:
    n, m = (4, 1) if exchange == "none" else (2, 2)
    case = trainable(seeded_case(exchange, n, m), **options)
    case = replace(case, model=replace(case.model, **FEATURES))
    given, generator = numbers(case), torch.Generator().manual_seed(case.seed)
    gradients = simulate(case, given, ranks)[1]
    for _ in range(3):
        along = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / tensor.numel() ** 0.5
            for name, tensor in {**given.weights, "x": given.x}.items()
        }
        measured = slope(case, given, Numbers(along, along["x"], given.upstream), ranks)
        assert predicted_slope(case, gradients, along) == pytest.approx(measured, rel=1e-7)
