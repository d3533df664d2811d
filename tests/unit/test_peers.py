"""Which decode steps may go through peers' memory, and how much of it (that they are right there, tests/gpu shows)."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from headgrid.experiment import budget
from headgrid.layout.batching import decode_micro_batches, owned_rows
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.peers import LARGEST_BYTES, peers_bytes, suits
from headgrid.runtime import peers
from headgrid.runtime.collectives import Axis
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import StageAxes
from headgrid.runtime.stage import Stage
from headgrid.spec.model import ModelSpec, find_model
from headgrid.spec.workload import Workload

SEED, TINY = find_model("seed"), find_model("tiny")
MOST = LARGEST_BYTES // (2 * SEED.hidden_size)


@pytest.mark.parametrize(
    "text", ["tp2", "tp4", "n2m2:batch", "n1m4:sequence", "tp2pp2", "tp2:fp32", "n1m2:batch+gathered"]
)
def test_plain_sums_over_a_power_of_two_of_ranks(text: str) -> None:
    assert suits(SEED, parse_layout(text), MOST, 2)
    assert not suits(SEED, parse_layout(text), MOST + 1, 2)
    assert not suits(SEED, parse_layout(text), 0, 2)
    assert not suits(SEED, parse_layout(text), 1, 8)
    for other in ({"linear_bias": ("o",)}, {"linear_bias": ("mlp",)}, {"norm_placement": "post"}):
        assert not suits(replace(SEED, **other), parse_layout(text), 1, 2)
    assert suits(replace(SEED, linear_bias=("qkv",)), parse_layout(text), 1, 2)


@pytest.mark.parametrize(
    "text", ["tp1", "dp4", "pp2", "n1m3:batch", "n2m3:batch", "n1m7:sequence", "tp4:sharded", "tp4:concat"]
)
def test_what_goes_through_collectives(text: str) -> None:
    assert not suits(SEED, parse_layout(text), 1, 2)


class Counted:
    """A window on a CPU: as many elements, and nobody reads them."""

    made: ClassVar[list[Tensor]] = []
    blocks = 128

    def __init__(self, axis: Axis, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.local = torch.empty(elements, dtype=dtype, device=device)
        self.made.append(self.local)


CASES = {
    "sums": (TINY, "tp2"),
    "stages": (TINY, "tp2pp2"),
    "drained": (TINY, "tp2pp2:drained"),
    "another exchange": (TINY, "n2m2:scores"),
    "gathered": (TINY, "n2m2:gather"),
    "spread": (TINY, "n2m2:sequence"),
    "spread in stages": (TINY, "n1m4pp2:sequence"),
    "shuffled": (TINY, "n2m2:batch"),
    "shuffled in stages": (TINY, "n1m4pp2:batch"),
    "replicas": (TINY, "n1m2dp2:batch+gathered"),
    "norms of heads": (replace(TINY, qk_norm=True), "n2m2:batch"),
    "slices of two widths": (replace(TINY, head_dim=10), "n1m4:batch"),
}


@pytest.mark.parametrize("batch", [5, 8])
@pytest.mark.parametrize("name", CASES)
def test_as_much_is_predicted_as_is_kept(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Window", Counted)
    model, layout = CASES[name][0], parse_layout(CASES[name][1])
    workload = Workload(batch=batch, seq=8, decode_steps=2, dtype="float16")
    predicted = [peers_bytes(model, layout, workload, rank) for rank in range(layout.ranks)]
    kept = [_kept(model, layout, workload, rank) for rank in range(layout.ranks)]
    assert predicted == kept and all(kept)
    more = replace(workload, batch=2 * batch)
    assert peers_bytes(model, layout, more, 0) > kept[0]


def _kept(model: ModelSpec, layout: Layout, workload: Workload, rank: int) -> int:
    """Bytes of the windows that a rank's decoding stage asks for."""
    at, here = layout.coordinates(rank), torch.device("cpu")
    tp = Axis("tp", tuple(range(layout.tp)), layout.tp_index(at), None)
    tp_slice = Axis("tp_slice", tuple(range(layout.num_dim_slices)), at.slice, None)
    weights = load(
        model, layout, rank, lambda _, shard: torch.zeros(shard.local_shape, dtype=torch.float16, device=here)
    )
    stage = Stage(model, layout, StageAxes(at, tp, tp_slice), weights, None, owned_rows(layout, workload.batch, rank))
    Counted.made.clear()
    peers.DirectStage(stage, decode_micro_batches(layout, workload, at.dp))
    return sum(window.nbytes for window in Counted.made)


def test_a_comparison_on_gpus_has_room_for_it() -> None:
    layouts = [parse_layout(text) for text in ("tp2", "n1m2:batch", "dp2")]
    work = Workload(batch=8, seq=8, decode_steps=1, dtype="float16")
    each = [peers_bytes(SEED, layout, work, 0) for layout in layouts]
    assert each[0] == 2 * 8 * SEED.hidden_size * 2 < each[1] and each[2] == 0
    gpu, cpu = (budget.need(SEED, layouts, work, device) for device in ("cuda", "cpu"))
    assert (gpu.peers_bytes, cpu.peers_bytes) == (sum(each), 0)


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
    assert peers.reachable(Ranks([here, here, here]), device)  # type: ignore[arg-type]
    assert not peers.reachable(Ranks([here, "b" * 12, "b" * 12]), device)  # type: ignore[arg-type]
    monkeypatch.setattr(fake, "can_device_access_peer", lambda a, b: a != 3)
    assert not peers.reachable(Ranks([here, here, here]), device)  # type: ignore[arg-type]
