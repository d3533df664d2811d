"""Two GPUs over NCCL: every exchange, prefill in chunks, ragged decode from CUDA graphs, gradients."""

from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from rank_work import MODEL, WORKLOAD

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import indices
from headgrid.reference import Reference, relative_error
from headgrid.runtime.launch import Job, run
from headgrid.runtime.layer import load
from headgrid.runtime.weights import draw

LAYOUTS = (
    "tp2",
    "tp2:sharded",
    "n1m2:gather",
    "n1m2:batch",
    "n1m2:batch+gathered",
    "n1m2:sequence",
    "n1m2:sequence+sharded+fp32",
    "n1m2:scores",
    "n1m2:scores+sharded",
    "n1m2:gather+concat",
    "pp2",
    "dp2",
    "tp2:overlapped",
    "tp2:sharded+overlapped",
    "n1m2:batch+overlapped",
    "n1m2:sequence+overlapped",
    "tp2:dp-attention",
    "tp2:dp-attention+overlapped",
)
TRAINED = tuple(text for text in LAYOUTS if "overlapped" not in text)
DIRECT = ("tp2", "n1m2:batch", "n1m2:sequence", "n1m2:gather", "n1m2:batch+gathered", "tp2:fp32", "pp2")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs on this machine"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run(Job("rank_work:run", {"layouts": LAYOUTS, "folder": str(folder)}, 2, "nccl"), log_to=Path(folder) / "logs")
    return {text: [torch.load(folder / f"{k}.{rank}.pt") for rank in range(2)] for k, text in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("direct")
    payload = {"layouts": DIRECT, "folder": str(folder)}
    run(Job("rank_work:run_direct", payload, 2, "nccl"), log_to=Path(folder) / "logs")
    return {text: [torch.load(folder / f"{k}.{rank}.pt") for rank in range(2)] for k, text in enumerate(DIRECT)}


@pytest.mark.parametrize("text", DIRECT)
def test_decode_through_peers(text: str, direct: dict[str, list[dict[str, Any]]]) -> None:
    """The same logits as through collectives, but for rounding; and the fault shows, where there are peers."""
    for rank in direct[text]:
        assert rank["collectives"]["decoder"] == "Stage"
        assert rank["peers"]["decoder"] == ("Stage" if text == "pp2" else "DirectStage")
        assert rank["collectives"]["as_predicted"]
        assert rank["peers"]["as_predicted"]
        if rank["peers"]["last"]:
            truth, found, fault, other = (
                rank[way]["logits"] for way in ("collectives", "peers", "fault", "unweighted")
            )
            assert torch.equal(rank["collectives"]["tokens"], rank["peers"]["tokens"])
            assert relative_error(found, truth) < 2e-6
            assert (relative_error(fault, truth) > 0.1) == (text != "pp2")
            assert (relative_error(other, truth) > 0.01) == (text == "n1m2:sequence")


@pytest.mark.timeout(120)
def test_a_first_decode_call_of_several_steps(tmp_path: Path) -> None:
    """Kernels are loaded at their first use, which a stage that already waits for the next message would never end."""
    run(Job("rank_work:run_cold", {"folder": str(tmp_path)}, 2, "nccl"), log_to=tmp_path / "logs")
    together, single = torch.load(tmp_path / "1.pt")  # only the last stage knows the tokens
    assert together.shape == (3, 1)
    assert torch.equal(together, single)


def _leaves(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shards = parameters(MODEL, Layout(), 0)
    return {n: draw(MODEL, 0, n, s, dtype=torch.float32).to(dtype).requires_grad_() for n, s in shards.items()}


@pytest.mark.parametrize("text", LAYOUTS)
def test_logits_of_every_length_and_collectives(text: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    found = outcomes[text]
    assert all(outcome["as_predicted"] for outcome in found)
    for outcome in (each for each in found if each["last"]):
        errors: list[list[float]] = []
        for i, row in enumerate(range(*outcome["rows"])):
            text_ids = torch.cat([rank_work.prompts()[row, : WORKLOAD.lengths[row]], outcome["tokens"][:-1, i]])[None]
            truth, floor = (
                Reference(MODEL, _leaves(dtype).__getitem__, dtype, device).logits(text_ids, 5)[0].detach().cpu()
                for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cuda"))
            )
            errors.append([relative_error(outcome["logits"][:, i], truth), relative_error(floor, truth)])
        mine, plain = torch.tensor(errors).square().mean(0).sqrt().tolist()
        assert mine <= 1.5 * plain, (mine, plain)


@pytest.mark.parametrize("text", TRAINED)
def test_gradients_of_all_weights(text: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    leaves = _leaves(torch.float64)
    reference = Reference(MODEL, leaves.__getitem__, torch.float64)
    (reference.logits(rank_work.prompts(), 24) * rank_work.upstream().double()).sum().backward()

    def cut(name: str, shard: Shard) -> torch.Tensor:
        gradient = leaves[name].grad
        assert gradient is not None
        rows = gradient[indices(shard.rows)]
        return rows[:, indices(shard.cols)] if shard.cols is not None else rows

    for rank, outcome in enumerate(outcomes[text]):
        expected = load(MODEL, parse_layout(text), rank, cut)
        assert outcome["gradients"].keys() == expected.keys()
        for name, gradient in outcome["gradients"].items():
            assert relative_error(gradient, expected[name]) < 2e-5, name
            assert relative_error(gradient.flatten().roll(1).view_as(gradient), expected[name]) > 0.1, name
