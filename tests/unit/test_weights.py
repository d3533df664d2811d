"""Drawn weights: any part is the same part of the whole, whoever draws it and however."""

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch
from grid import EVERY_MODEL, model
from torch import Tensor

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import legal_layouts
from headgrid.layout.shards import Shard, parameters
from headgrid.layout.span import indices
from headgrid.runtime import weights
from headgrid.runtime.layer import load
from headgrid.runtime.weights import distribution, draw, whole
from headgrid.spec.model import ModelSpec

FP32 = torch.float32
LARGE = model(
    *(8, 4, 32),
    num_layers=3,
    hidden_size=256,
    mlp_hidden_size=512,
    vocab_size=512,
    linear_bias=("qkv", "o", "mlp"),
    attention_gain=2.5,
)


def part_of(tensor: Tensor, shard: Shard) -> Tensor:
    rows = tensor[indices(shard.rows)]
    return rows if shard.cols is None else rows[:, indices(shard.cols)]


@pytest.mark.parametrize(("name", "spec"), EVERY_MODEL, ids=[name for name, _ in EVERY_MODEL])
def test_a_shard_drawn_is_the_same_part_of_the_whole(name: str, spec: ModelSpec) -> None:
    shapes = parameters(spec, Layout(), 0)
    everything = {tensor: draw(spec, 3, tensor, shard, dtype=FP32) for tensor, shard in shapes.items()}
    for layout in legal_layouts(spec, 6)[::4]:
        for rank in range(layout.ranks):
            for tensor, shard in parameters(spec, layout, rank).items():
                drawn = draw(spec, 3, tensor, shard, dtype=FP32)
                assert torch.equal(drawn, part_of(everything[tensor], shard)), (str(layout), rank, tensor)


def test_a_large_matrix_drawn_in_pieces_is_the_one_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = parameters(LARGE, parse_layout("n2m2:batch"), 3)["layers.1.attention.q.weight"]
    at_once = draw(LARGE, 0, "layers.1.attention.q.weight", shard, dtype=FP32)
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    assert torch.equal(draw(LARGE, 0, "layers.1.attention.q.weight", shard, dtype=FP32), at_once)


@pytest.mark.parametrize("tied", [False, True])
def test_mean_and_deviation_are_as_declared(tied: bool) -> None:
    spec = LARGE if not tied else ModelSpec(**LARGE.to_dict() | {"tied_embeddings": True})  # type: ignore[arg-type]
    shards = {name: shard for name, shard in parameters(spec, Layout(), 0).items() if ".1." not in name}
    assert len(shards) > 2 * 16
    for name, shard in shards.items():
        drawn, (mean, std) = draw(spec, 1, name, shard, dtype=torch.float64), distribution(spec, name)
        count = drawn.numel()
        assert abs(drawn.mean().item() - mean) < 5 * std / count**0.5, name
        assert abs(drawn.std().item() / std - 1) < 5 / count**0.5, name
        assert drawn.sub(mean).abs().max().item() <= std * 3**0.5 * (1 + 1e-6), "uniform"


def test_declared_deviations() -> None:
    """Attention as peaky as the gain says; W_O and W_down smaller with depth, so that the residual keeps its size."""
    assert distribution(LARGE, "layers.0.attention.q.weight") == (0.0, 2.5 / 16)
    assert distribution(LARGE, "layers.0.attention.k.weight") == (0.0, 2.5 / 16)
    assert distribution(LARGE, "layers.0.attention.v.weight") == (0.0, 1 / 16)
    assert distribution(LARGE, "layers.0.attention.o.weight")[1] == pytest.approx(1 / 16 / 6**0.5)
    assert distribution(LARGE, "layers.2.mlp.down.weight")[1] == pytest.approx(2 / 512**0.5 / 6**0.5)
    assert distribution(LARGE, "final.norm.weight") == (1.0, 0.1)
    assert distribution(LARGE, "layers.1.mlp.up.bias") == (0.0, 0.1)


def test_norms_of_heads_make_attention_as_peaky_as_the_gain_says() -> None:
    """Scores of normed heads have the deviation of the product of both means, whatever W_Q and W_K are."""
    spec = replace(LARGE, qk_norm=True)
    for part in "qk":
        name = f"layers.1.attention.{part}_norm.weight"
        assert distribution(spec, name) == (2.5, pytest.approx(0.25))
        drawn = draw(spec, 0, name, parameters(spec, Layout(), 0)[name], dtype=torch.float64)
        assert drawn.shape == (32,)
        assert drawn.sub(2.5).abs().max().item() <= 0.25 * 3**0.5 * (1 + 1e-6)
        assert drawn.std().item() > 0.1, "not constant, so that a slice of the wrong channels shows"
    others = {name: distribution(spec, name) for name in parameters(LARGE, Layout(), 0)}
    assert others == {name: distribution(LARGE, name) for name in parameters(LARGE, Layout(), 0)}


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_tensors_of_other_names_and_other_seeds_have_nothing_in_common() -> None:
    shard, names = whole((256, 256)), ["layers.0.attention.q.weight", "layers.0.attention.k.weight", "head.weight"]
    drawn = [draw(LARGE, seed, name, shard, dtype=torch.float64) for seed in (0, 1) for name in names]
    for a, b in itertools.combinations(drawn, 2):
        assert correlation(a, b) < 0.02
    first = drawn[0]
    assert correlation(first[1:], first[:-1]) < 0.02, "nor have neighbouring rows"
    assert correlation(first[:, 1:], first[:, :-1]) < 0.02, "nor neighbouring columns"
    assert torch.equal(first, draw(LARGE, 0, names[0], shard, dtype=torch.float64)), "but the same seed draws the same"


def splitmix64(seed: int, name: str, index: int) -> float:
    """Steele, Lea, Flood 2014, in Python's own integers: a number in (-1, 1)."""
    mask = (1 << 64) - 1
    z = (
        index * 0x9E3779B97F4A7C15 + int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
    ) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return ((z >> 40) - (1 << 23) + 0.5) / (1 << 23)


def test_elements_are_what_splitmix64_says_at_their_global_index() -> None:
    name, columns = "layers.0.attention.v.weight", 256
    drawn = draw(LARGE, 5, name, whole((128, columns)), dtype=torch.float64)
    scale = distribution(LARGE, name)[1] * 3**0.5
    for row, column in ((0, 0), (0, 255), (1, 0), (77, 31), (127, 255)):
        expected = splitmix64(5, name, row * columns + column) * scale
        assert drawn[row, column].item() == pytest.approx(expected, rel=1e-6)


def test_other_dtypes_round_the_same_values() -> None:
    name, shard = "layers.0.mlp.up.weight", whole((64, 256))
    exact = draw(LARGE, 0, name, shard, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(draw(LARGE, 0, name, shard, dtype=dtype), exact.to(dtype))


def test_load_stacks_q_k_and_v_and_keeps_the_rest() -> None:
    layout, spec = parse_layout("n2m2:gather"), replace(LARGE, qk_norm=True)
    shards = parameters(spec, layout, 2)

    def get(name: str, shard: Shard) -> Tensor:
        return draw(spec, 0, name, shard, dtype=FP32)

    loaded = load(spec, layout, 2, get)
    for kind in ("weight", "bias"):
        trio = [get(name, shards[name]) for name in (f"layers.1.attention.{p}.{kind}" for p in "qkv")]
        assert torch.equal(loaded.pop(f"layers.1.attention.qkv.{kind}"), torch.cat(trio))
    others = {name for name in loaded if ".qkv." not in name}
    assert others == {name for name in shards if name.split(".")[-2] not in "qkv"}
    assert {"layers.0.attention.q_norm.weight", "layers.2.attention.k_norm.weight"} < others
    assert all(torch.equal(loaded[name], get(name, shards[name])) for name in others)
