"""Real ranks load and save a checkpoint of 300 MB: bytes read, memory, and the bits that come out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from loading_work import Run, Took
from safetensors.torch import save_file
from torch import Tensor

from headgrid.runtime.launch import Job, run

RANKS = 4
MOST_ABOVE_SHARE, MOST_READ = 200_000_000, 1.1
HIDDEN, INNER, VOCAB, LAYERS, KV_SIZE = 2048, 5632, 16_000, 2, 256
RUNS = {
    "tp4": Run("tp4", check=True),
    "slices": Run("n1m4:batch", save_to=Path("saved")),
    "concat": Run("n2m2:gather+concat", check=True),
    "stages": Run("n1m2pp2:batch", dtype="float16", check=True),
    "replicas": Run("tp2dp2"),
}
CONTROLS = {
    "everything at once": Run("dp4", stage_bytes=1 << 40),
    "each rank for itself": Run("n1m4:batch", alone=True),
}


def numbers(*shape: int) -> Tensor:
    """Random bf16, finite and positive, faster than randn."""
    return torch.empty(shape, dtype=torch.int16).random_().bitwise_and_(0x3FFF).view(torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two wide layers."""
    found = tmp_path_factory.mktemp("llama300")
    tensors = {"model.embed_tokens.weight": numbers(VOCAB, HIDDEN), "lm_head.weight": numbers(VOCAB, HIDDEN)}
    tensors |= {"model.norm.weight": numbers(HIDDEN)}
    for layer in range(LAYERS):
        shapes = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_SIZE, HIDDEN),
            "self_attn.v_proj": (KV_SIZE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": numbers(*shape) for name, shape in shapes.items()}
    save_file(tensors, found / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    (found / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def took(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Took]]:
    """What each run took, by rank: all of them in one launch."""
    results = tmp_path_factory.mktemp("results")
    every = RUNS | CONTROLS
    runs = [
        Run(each.layout, each.dtype, each.stage_bytes, each.alone, each.check, each.save_to and results / each.save_to)
        for each in every.values()
    ]
    payload = {"folder": str(folder), "runs": runs, "results": str(results)}
    run(Job("loading_work:measure", payload, RANKS, "gloo"), log_to=results / "logs")
    by_rank = [torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    (folder / "saved").symlink_to(results / "saved")
    return {name: [found[k] for found in by_rank] for k, name in enumerate(every)}


def read_share(took: list[Took], folder: Path, count: Callable[[Took], int]) -> float:
    """Bytes that all ranks read, of the checkpoint's."""
    return sum(map(count, took)) / (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_together_read_each_byte_once(name: str, folder: Path, took: dict[str, list[Took]]) -> None:
    assert 0.99 < read_share(took[name], folder, lambda rank: rank.counted_bytes) <= 1.0
    assert 0.99 < read_share(took[name], folder, lambda rank: rank.read_bytes) < MOST_READ


def test_ranks_that_read_alone_read_more(folder: Path, took: dict[str, list[Took]]) -> None:
    """The control: rows that are cut by columns are read by each of their owners."""
    assert read_share(took["each rank for itself"], folder, lambda rank: rank.read_bytes) > 1.5


@pytest.mark.parametrize("name", RUNS)
def test_a_rank_holds_little_beside_its_share(name: str, took: dict[str, list[Took]]) -> None:
    assert max(rank.above_share_bytes for rank in took[name]) < MOST_ABOVE_SHARE
    assert max(rank.save_above_bytes for rank in took[name]) < MOST_ABOVE_SHARE


def test_what_is_loaded_at_once_is_noticed(took: dict[str, list[Took]]) -> None:
    assert min(rank.above_share_bytes for rank in took["everything at once"]) > MOST_ABOVE_SHARE


@pytest.mark.parametrize("name", [name for name, each in RUNS.items() if each.check])
def test_every_rank_gets_its_part(name: str, took: dict[str, list[Took]]) -> None:
    assert [rank.wrong for rank in took[name]] == [()] * RANKS


def test_what_is_saved_is_what_was_loaded(folder: Path, took: dict[str, list[Took]]) -> None:
    assert took["slices"]
    files = (folder / "model.safetensors", folder / "saved" / "model.safetensors")
    with safetensors.safe_open(files[0], "pt") as original, safetensors.safe_open(files[1], "pt") as saved:
        assert set(original.keys()) == set(saved.keys())
        for name in original.keys():
            assert torch.equal(original.get_tensor(name), saved.get_tensor(name)), name
