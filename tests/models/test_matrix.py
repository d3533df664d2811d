"""Every family of models on every exchange and number of ranks: the tokens and the logits of transformers.

Models are small and random, with heads that divide badly; ranks are real. transformers runs in fp32 with its eager
attention: alone (`generate`), and once over the very tokens that the ranks have chosen.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from greedy_judge import BOUND, Greedy, Tally, relative
from matrix_cases import (
    DECODERS,
    FAMILIES,
    LAYERS,
    NEW_TOKENS,
    RANKS,
    SAMPLE,
    MatrixCase,
    Truth,
    everything,
    outputs,
    truths,
)
from model_work import Ranks
from torch import Tensor, nn

from headgrid.layout.layout import EXCHANGES, parse_layout

MOVED = 0.1
"""What another function must move the logits by, or an error might not show."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", everything() if full else SAMPLE, ids=lambda case: case.id)
    if "unexchanged" in metafunc.fixturenames:
        metafunc.parametrize("unexchanged", FAMILIES if full else ("llama",))


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    return truths(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def continuations(truth_of: Callable[[str], Truth]) -> Callable[[str], list[list[int]]]:
    """What transformers generates alone, once for each family."""
    kept: dict[str, list[list[int]]] = {}

    def find(family: str) -> list[list[int]]:
        if family not in kept:
            truth = truth_of(family)
            kept[family] = truth.continuations() if family in DECODERS else [[] for _ in truth.prompts]
        return kept[family]

    return find


@pytest.fixture(scope="module")
def steps_of(request: pytest.FixtureRequest) -> Callable[[MatrixCase], int]:
    """New tokens of a case: fewer in the sample on more ranks, where a step takes longer the fewer cores there are."""
    full = request.config.getoption("--full")
    decoder = {family: NEW_TOKENS for family in DECODERS}
    return lambda case: min(decoder.get(case.family, 0), NEW_TOKENS if full else 2 * NEW_TOKENS // case.ranks)


def run(on_ranks: Ranks, truth: Truth, layout: str, steps: int) -> list[dict[str, Any]]:
    arguments = {"folder": str(truth.folder), "layout": layout, "ids": truth.prompts, "steps": steps}
    return on_ranks(parse_layout(layout).ranks, "greedy", **arguments)


def test_ranks_give_what_transformers_gives(
    case: MatrixCase,
    on_ranks: Ranks,
    truth_of: Callable[[str], Truth],
    continuations: Callable[[str], list[list[int]]],
    steps_of: Callable[[MatrixCase], int],
    tally: Tally,
) -> None:
    truth, steps = truth_of(case.family), steps_of(case)
    found = run(on_ranks, truth, case.layout, steps)
    tokens = found[0]["tokens"]
    assert all(each["tokens"] == tokens for each in found)
    for row, prompt in enumerate(truth.prompts):
        whole = outputs(truth.model, prompt + tokens[row])
        error = max(relative(each["whole"][row], whole) for each in found)
        assert tally.error("all tokens at once", error) < BOUND
        if tokens[row]:
            greedy = Greedy(tokens[row], whole[len(prompt) - 1 : -1])
            error = max(relative(each["logits"][row], greedy.logits) for each in found)
            assert tally.error("token by token", error) < BOUND
            assert greedy.wrong == []
            alone = continuations(case.family)[row][:steps]
            assert not greedy.parts_wrongly(alone)
            tally.counts.update(greedy.counts(alone))
    tally.counts["cases"] += 1


def halved(model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """What a model of transformers computes with the scale of its scores halved."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "scaling")]
    assert len(layers) == LAYERS
    for layer in layers:
        layer.scaling /= 2
    result = compute()
    for layer in layers:
        layer.scaling *= 2
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_matters(family: str, truth_of: Callable[[str], Truth]) -> None:
    """Scores that are half as large give another function, by far."""
    truth = truth_of(family)
    for ids in truth.prompts:
        moved = relative(halved(truth.model, lambda ids=ids: outputs(truth.model, ids)), outputs(truth.model, ids))
        assert moved > MOVED or len(ids) == 1


def test_ranks_that_exchange_nothing_are_rejected(
    unexchanged: str, on_ranks: Ranks, truth_of: Callable[[str], Truth]
) -> None:
    truth = truth_of(unexchanged)
    found, wrong = run(on_ranks, truth, "n1m2:independent", 20 if unexchanged in DECODERS else 0)[0], list[int]()
    for row, prompt in enumerate(truth.prompts):
        whole = outputs(truth.model, prompt + found["tokens"][row])
        assert relative(found["whole"][row], whole) > MOVED or len(prompt) == 1
        if found["tokens"][row]:
            greedy = Greedy(found["tokens"][row], whole[len(prompt) - 1 : -1])
            assert relative(found["logits"][row], greedy.logits) > MOVED
            wrong += greedy.wrong
    assert wrong or unexchanged not in DECODERS


@pytest.mark.parametrize("family", DECODERS)
def test_a_wrong_token_is_noticed(
    family: str, truth_of: Callable[[str], Truth], continuations: Callable[[str], list[list[int]]]
) -> None:
    """One second choice among 256, tokens that are one step late, logits that are 3e-5 too large."""
    prompt, tokens = truth_of(family).prompts[0], continuations(family)[0]
    logits = outputs(truth_of(family).model, prompt + tokens)[len(prompt) - 1 : -1]
    right = Greedy(tokens, logits)
    assert right.wrong == [] and not right.parts_wrongly(tokens)
    clear = right.near_ties.index(False, 100)
    second = [*tokens[:clear], int(logits[clear].topk(2).indices[1]), *tokens[clear + 1 :]]
    assert Greedy(second, logits).wrong == [clear]
    assert right.parts_wrongly(second)
    assert len(Greedy([tokens[-1], *tokens[:-1]], logits).wrong) > NEW_TOKENS / 4
    assert relative(logits * (1 + 3e-5), logits) > BOUND
    assert min(len(set(each)) for each in continuations(family)) > 12  # the same token for ever says little


def test_only_a_near_tie_excuses_another_token() -> None:
    logits = torch.zeros(2, 5)
    logits[:, 1], logits[0, 3], logits[1, 3] = 10.0, 9.9999, 9.999
    assert Greedy([3, 3], logits).differing == [0, 1]
    assert Greedy([3, 3], logits).wrong == [1]
    assert not Greedy([3, 1], logits).parts_wrongly([1, 1])
    assert Greedy([1, 3], logits).parts_wrongly([1, 1])


def test_the_matrix_is_whole() -> None:
    cases = everything()
    layouts = [(case.family, parse_layout(case.layout)) for case in cases]
    found = {(family, layout.exchange, layout.ranks) for family, layout in layouts}
    assert {(f, e, p) for f in FAMILIES for e in EXCHANGES for p in RANKS} <= found
    assert set(SAMPLE) <= set(cases)
    sampled = [parse_layout(case.layout) for case in SAMPLE]
    assert {case.family for case in SAMPLE} == set(FAMILIES)
    assert {layout.exchange for layout in sampled} == set(EXCHANGES)
    assert {layout.ranks for layout in sampled} == set(RANKS)
