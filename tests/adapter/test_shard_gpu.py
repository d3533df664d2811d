"""Two GPUs over NCCL: models built on the host, sharded to each rank's GPU."""

from typing import Any

import pytest
import torch
from adapter_cases import AdapterCase
from adapter_judge import relative

CASES = (
    AdapterCase("llama", "n1m2:batch", ("logits", "greedy", "sampled", "beams", "turns", "stepped")),
    AdapterCase("gemma3", "n1m2:sequence", ("logits", "greedy", "turns")),
    AdapterCase("gpt2", "n1m2:scores", ("logits", "greedy")),
    AdapterCase("qwen3", "n1m2:gather", ("logits", "greedy")),
    AdapterCase("bert", "tp2", ("hidden",)),
)
BOUND = 1e-4  # two devices: sums in another order, and other exponentials
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs on this machine"),
]


@pytest.fixture(scope="module")
def found(launch) -> dict[AdapterCase, list[dict[str, Any]]]:
    return dict(zip(CASES, launch(2, [case.job for case in CASES], backend="nccl"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gpus_find_what_one_process_finds(case: AdapterCase, found, expected) -> None:
    """Sampled tokens come from other random numbers on a GPU: there only the ranks must agree."""
    for rank in found[case]:
        assert "error" not in rank, rank["error"]
        for name in case.names:
            for key, truth in expected(case.family, name).items():
                if name == "sampled":
                    assert torch.equal(rank[name][key], found[case][0][name][key])
                elif truth.dtype == torch.int64:
                    assert torch.equal(rank[name][key], truth), (name, key)
                else:
                    assert relative(rank[name][key], truth) < BOUND, (name, key)
