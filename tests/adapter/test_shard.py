"""A sharded transformers model gives what the whole one gives: the same tokens, and logits within 1e-5 relative."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_cases import SAMPLE, AdapterCase, everything
from adapter_judge import disagreements, relative
from adapter_models import build
from adapter_scenarios import SCENARIOS

from headgrid.layout.layout import parse_layout

CASES_A_LAUNCH = 12
Outcome = list[dict[str, Any]]
pytestmark = pytest.mark.timeout(1200)  # the first case of a launch waits for all of them


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = everything() if metafunc.config.getoption("--full") else SAMPLE
        metafunc.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture(scope="session")
def outcome(launch, request: pytest.FixtureRequest) -> Callable[[AdapterCase], Outcome]:
    """What each rank found in a case. Wanted cases of as many ranks run in one launch, up to CASES_A_LAUNCH of them."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    wanted: dict[int, dict[AdapterCase, None]] = defaultdict(dict)
    for item in items:
        if isinstance(case := item.callspec.params.get("case"), AdapterCase):
            wanted[case.ranks][case] = None
    found: dict[AdapterCase, Outcome] = {}

    def find(case: AdapterCase) -> Outcome:
        if case not in found:
            cases = list(wanted[case.ranks])
            start = cases.index(case) // CASES_A_LAUNCH * CASES_A_LAUNCH
            cases = cases[start : start + CASES_A_LAUNCH]
            found.update(zip(cases, launch(case.ranks, [each.job for each in cases]), strict=True))
        return found[case]

    return find


def test_every_rank_finds_what_one_process_finds(case: AdapterCase, outcome, expected) -> None:
    for rank, found in enumerate(outcome(case)):
        assert "error" not in found, f"rank {rank}: {found['error']}"
        wrong = {name: disagreements(found[name], expected(case.family, name)) for name in case.names}
        assert {name: what for name, what in wrong.items() if what} == {}, f"rank {rank}"


def times_held(key: str, case: AdapterCase) -> int:
    """On how many ranks the layout has each element of this tensor."""
    layout = parse_layout(case.layout)
    if "q_norm" in key or "k_norm" in key:  # by channels of a head, in each head group
        return layout.num_head_groups
    if key.endswith(("attn.c_proj.bias", "attention.output.dense.bias")):
        return 1 if layout.output == "concat" else case.ranks
    small = ("norm", "ln_", "wpe", "position", "token_type", "LayerNorm", "pooler")
    sums = ("mlp.c_proj.bias", "output.dense.bias")
    return case.ranks if any(part in key for part in small) or key.endswith(sums) else 1


def test_no_matrix_is_held_twice(case: AdapterCase, outcome) -> None:
    """Only vectors are, learned positions and an encoder's pooler: the ranks together hold as much as that makes."""
    whole = [(key, x.numel()) for key, x in build(case.family).named_parameters()]
    held = [found["parameters"] for found in outcome(case)]
    assert sum(held) == sum(size * times_held(key, case) for key, size in whole)
    copied = sum(size for key, size in whole if times_held(key, case) > 1)
    divided = sum(size for key, size in whole if times_held(key, case) == 1)
    assert max(held) - copied < 1.35 * divided / case.ranks  # 5 pairs of channels on 4 slices are not even


def test_the_models_are_sensitive(expected) -> None:
    """Uniform attention in one layer of three is another function, by far."""
    for family in ("llama", "gpt2", "gemma3", "bert"):
        name = "hidden" if family == "bert" else "logits"
        model = build(family)
        for key, x in model.named_parameters():
            if any(
                part in key for part in (".1.self_attn.q_proj", "layer.1.attention.self.query", "h.1.attn.c_attn.w")
            ):
                x.data[:, :48].zero_() if "c_attn" in key else x.data.zero_()
        key = next(iter(expected(family, name)))
        assert relative(SCENARIOS[name](model)[key], expected(family, name)[key]) > 0.1, family


def test_the_comparison_can_fail(expected) -> None:
    tokens = expected("llama", "greedy")
    assert disagreements({"tokens": tokens["tokens"].roll(1, 1)}, tokens)
    assert not disagreements(dict(tokens), tokens)


def test_what_is_generated_is_not_trivial(expected) -> None:
    new = expected("llama", "greedy")["tokens"][:, 20:]
    assert len(set(new[0].tolist())) > 5 and not torch.equal(new[0], new[1])
