"""Which decode steps may go through peers' memory (that they are right there, tests/gpu shows)."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from headgrid.layout.layout import parse_layout
from headgrid.runtime import peers
from headgrid.runtime.peers import LARGEST_BYTES, reachable, suits
from headgrid.spec.model import find_model

SEED = find_model("seed")
MOST = LARGEST_BYTES // (2 * SEED.hidden_size)


@pytest.mark.parametrize(
    "text", ["tp2", "tp4", "n2m2:batch", "n1m4:sequence", "tp2pp2", "tp2:fp32", "n1m2:batch+gathered"]
)
def test_plain_sums_over_a_power_of_two_of_ranks(text: str) -> None:
    assert suits(SEED, parse_layout(text), MOST, torch.float16)
    assert not suits(SEED, parse_layout(text), MOST + 1, torch.float16)
    assert not suits(SEED, parse_layout(text), 0, torch.float16)
    assert not suits(SEED, parse_layout(text), 1, torch.float64)
    for other in ({"linear_bias": ("o",)}, {"linear_bias": ("mlp",)}, {"norm_placement": "post"}):
        assert not suits(replace(SEED, **other), parse_layout(text), 1, torch.float16)
    assert suits(replace(SEED, linear_bias=("qkv",)), parse_layout(text), 1, torch.float16)


@pytest.mark.parametrize(
    "text", ["tp1", "dp4", "pp2", "n1m3:batch", "n2m3:batch", "n1m7:sequence", "tp4:sharded", "tp4:concat"]
)
def test_what_goes_through_collectives(text: str) -> None:
    assert not suits(SEED, parse_layout(text), 1, torch.float16)


class Ranks:
    """An axis whose other ranks say they are on these hosts."""

    def __init__(self, others: list[str]) -> None:
        self.others, self.size = others, 1 + len(others)

    def all_gather(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        assert x.numel() == 1 and sizes == [1] * self.size
        return torch.cat([x, torch.tensor([int(other, 16) for other in self.others])])


def test_memory_of_another_host_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both hosts have more GPUs than the launcher uses, so that numbers of ranks look like one host's."""
    fake: Any = torch.cuda
    monkeypatch.setattr(fake, "device_count", lambda: 8)
    monkeypatch.setattr(fake, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(peers, "host_id", lambda: "a" * 12)
    here, device = "a" * 12, torch.device("cpu")
    assert reachable(Ranks([here, here, here]), device)  # type: ignore[arg-type]
    assert not reachable(Ranks([here, "b" * 12, "b" * 12]), device)  # type: ignore[arg-type]
    monkeypatch.setattr(fake, "can_device_access_peer", lambda a, b: a != 3)
    assert not reachable(Ranks([here, here, here]), device)  # type: ignore[arg-type]
