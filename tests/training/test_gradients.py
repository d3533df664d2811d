"""Training on real ranks: gradients of all weights, and the loss, against the single-device reference's."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import training_work
from training_cases import FAULTS, FAULTY, MODEL, WORLD_SIZES, TrainingCase, all_cases, sampled

from headgrid.errors import InvalidLayout
from headgrid.layout.gradients import training_collectives
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import indices
from headgrid.layout.traffic import Collective
from headgrid.reference import Reference, relative_error
from headgrid.runtime.launch import Job, run
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.training import Trainer
from headgrid.runtime.weights import draw
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

BOUND = 1e-11
pytestmark = pytest.mark.timeout(1200)  # the first case waits for all of them
LEAST, LEAST_FULL = 150, 370
WRONG = [TrainingCase(f"{text}-{fault}", MODEL, parse_layout(text), fault=fault) for text in FAULTY for fault in FAULTS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = all_cases() if metafunc.config.getoption("--full") else sampled(all_cases())
        metafunc.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Outcomes of all cases by their ids: one launch of real ranks for each world size."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    asked = {
        case.id: case for item in items for case in item.callspec.params.values() if isinstance(case, TrainingCase)
    }
    found: dict[str, list[dict[str, Any]]] = {}
    fork_server.ensure_running()
    for ranks in WORLD_SIZES:
        cases = [case for case in asked.values() if case.ranks == ranks]
        folder = tmp_path_factory.mktemp(f"training{ranks}")
        if cases:
            run(
                Job("training_work:run", {"cases": cases, "folder": str(folder)}, ranks, "gloo"), log_to=folder / "logs"
            )
        for k, case in enumerate(cases):
            found[case.id] = [_read(folder / f"{k}.{rank}.pt") for rank in range(ranks)]
    return found


def _read(path: Path) -> dict[str, Any]:
    outcome = torch.load(path)
    path.unlink()
    return outcome


@cache
def reference(model: ModelSpec, workload: Workload) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of all whole weights, and the loss of each row."""
    case = TrainingCase("reference", model, Layout(), workload)
    shards = parameters(model, Layout(), 0)
    leaves = {name: draw(model, 0, name, s, dtype=torch.float64).requires_grad_() for name, s in shards.items()}
    logits = Reference(model, leaves.__getitem__, torch.float64).logits(training_work.tokens(case), workload.seq)
    losses = (logits * training_work.upstream(case)).flatten(1).sum(1)
    losses.sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, losses.detach()


def worst(case: TrainingCase, outcomes: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative error of any weight's gradient on any rank, and where it is."""
    whole, _ = reference(case.model, case.workload)

    def cut(name: str, shard: Shard) -> torch.Tensor:
        rows = whole[name][indices(shard.rows)]
        return rows[:, indices(shard.cols)] if shard.cols is not None else rows

    found = (-1.0, "nothing")
    for rank, outcome in enumerate(outcomes):
        expected = load(case.model, case.layout, rank, cut)
        assert outcome["gradients"].keys() == expected.keys()
        errors = [(relative_error(outcome["gradients"][n], x), f"{n} of rank {rank}") for n, x in expected.items()]
        found = max(found, *errors)
    return found


def test_gradients_are_those_of_one_device(case: TrainingCase, launches: dict[str, list[dict]]) -> None:
    outcomes = launches[case.id]
    error, where = worst(case, outcomes)
    assert error < BOUND, where
    losses = reference(case.model, case.workload)[1]
    for outcome in (each for each in outcomes if each["last"]):
        expected = losses[outcome["rows"]].sum()
        assert abs(outcome["loss"] - expected) < 1e-11 * losses.abs().sum()


def test_collectives_of_both_passes_are_as_predicted(case: TrainingCase, launches: dict[str, list[dict]]) -> None:
    for rank, outcome in enumerate(launches[case.id]):
        issued = Counter(Collective(*call) for call in outcome["issued"])
        predicted = training_collectives(case.model, case.layout, case.workload, rank)
        assert issued == predicted, (rank, issued - predicted, predicted - issued)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda case: case.id)
def test_a_missing_sum_is_found(wrong: TrainingCase, launches: dict[str, list[dict]]) -> None:
    needless = wrong.id == "tp4-gradients of copies not summed"  # there are none: nothing must change
    assert (worst(wrong, launches[wrong.id])[0] < BOUND) == needless


def test_the_suite_has_its_cases(request: pytest.FixtureRequest) -> None:
    assert len(all_cases()) == len({case.id for case in all_cases()}) >= LEAST_FULL
    assert len(sampled(all_cases())) >= LEAST
    exchanges = {case.layout.exchange for case in sampled(all_cases())}
    assert exchanges == {"none", "gather", "batch", "sequence", "scores"}


def test_what_cannot_be_trained_is_refused() -> None:
    chunked = Workload(batch=2, seq=8, decode_steps=0, dtype="float64", chunk_positions=4)
    layout = Layout()
    mesh, pool = Mesh(layout, GroupPool(0)), GroupPool(0)
    with pytest.raises(InvalidLayout, match="whole sequences"):
        Trainer(MODEL, layout, chunked, mesh, pool, {"x": torch.zeros(1)})
