"""Tiny random models of several families, saved by transformers, and ranks that load them inside one process."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import Shard, parameters, stacks
from headgrid.layout.span import indices
from headgrid.models.config import ModelConfig, read_spec
from headgrid.models.names import Source, sources
from headgrid.models.safetensors import Checkpoint, open_checkpoint
from headgrid.models.stream import load
from headgrid.runtime.collectives import Axis
from headgrid.spec.model import ModelSpec

_DECODER = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 40,
    "tie_word_embeddings": False,
}
_GPT2 = {"vocab_size": 47, "n_positions": 19, "n_embd": 24, "n_layer": 2, "n_head": 3}
_BERT = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 31,
    "max_position_embeddings": 21,
}
FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)),
    "qwen2-tied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_DECODER | {"tie_word_embeddings": True, "head_dim": 4})
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_DECODER | {"tie_word_embeddings": True})
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
}
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "llama": (
        "tp2",
        "tp6",
        "n1m3:gather",
        "n2m3:batch",
        "n2m2:gather+concat",
        "n1m2pp2:scores",
        "tp2dp2",
        "tp3:dp-attention",
        "tp2pp2:dp-attention",
        "pp3",
        "tp6pp2",
    ),
    "qwen2-tied": ("tp6", "n2m2:sequence+concat", "n1m2pp3:batch", "tp2pp2dp2"),
    "qwen3": ("n1m5:scores", "n2m4:batch+gathered", "tp2pp3"),
    "gemma2": ("n2m3:sequence", "tp6", "n1m2pp2dp2:gather"),
    "gpt2": ("tp3", "n1m3:gather+concat", "n3m2:batch", "n1m4pp2:scores", "tp3dp2"),
    "bert": ("tp3", "n3m2:gather+concat", "n1m4:batch", "tp3pp2dp2"),
}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def save_tiny(name: str, folder: Path, dtype: str = "float32", **save: Any) -> Path:
    """A model of this family with random weights, no two of them alike, as transformers saves it."""
    torch.manual_seed(sum(map(ord, name)))
    model = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.to(TORCH[dtype]).save_pretrained(folder, **save)
    return folder


@dataclass(frozen=True)
class Opened:
    """A checkpoint with what is needed to load it."""

    config: ModelConfig
    checkpoint: Checkpoint
    sources: Mapping[str, Source]

    @property
    def model(self) -> ModelSpec:
        return self.config.spec


def opened(folder: Path) -> Opened:
    config, checkpoint = read_spec(folder), open_checkpoint(folder)
    return Opened(config, checkpoint, sources(config.spec, config.family, checkpoint.tensors))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def named(name: str, state: Mapping[str, Tensor], model: ModelSpec) -> dict[str, Tensor]:
    """Every tensor of the model, whole and by its global name, as the family's modeling code reads it: written apart
    from the tables that are tested.
    """
    find = {"gpt2": _gpt2, "bert": _bert}.get(name, _decoder)
    return {each: find(each, state, model) for each in parameters(model, Layout(), 0)}


def _decoder(name: str, state: Mapping[str, Tensor], model: ModelSpec) -> Tensor:
    top = {"embedding.weight": "model.embed_tokens.weight", "final.norm.weight": "model.norm.weight"}
    if name in top or name == "head.weight":
        return state[top.get(name, "lm_head.weight")]
    layer, part = name.removeprefix("layers.").split(".", 1)
    both = model.norm_placement == "both"
    norms = {
        "attention.norm.weight": "input_layernorm.weight",
        "attention.post_norm.weight": "post_attention_layernorm.weight",
        "mlp.norm.weight": f"{'pre_feedforward' if both else 'post_attention'}_layernorm.weight",
        "mlp.post_norm.weight": "post_feedforward_layernorm.weight",
    }
    if part in norms:
        return state[f"model.layers.{layer}.{norms[part]}"]
    half, piece, kind = part.split(".")
    if piece.endswith("_norm"):
        return state[f"model.layers.{layer}.self_attn.{piece}.{kind}"]
    return state[f"model.layers.{layer}.{'self_attn' if half == 'attention' else 'mlp'}.{piece}_proj.{kind}"]


def _gpt2(name: str, state: Mapping[str, Tensor], model: ModelSpec) -> Tensor:
    top = {"embedding": "wte", "positions": "wpe", "final.norm": "ln_f"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return state[f"transformer.{top[stem]}.{kind}"]
    layer, half, part = stem.removeprefix("layers.").split(".")
    if part == "norm":
        return state[f"transformer.h.{layer}.ln_{1 if half == 'attention' else 2}.{kind}"]
    if part in "qkv":
        fused = state[f"transformer.h.{layer}.attn.c_attn.{kind}"].split(model.hidden_size, dim=-1)
        return fused["qkv".index(part)].t() if kind == "weight" else fused["qkv".index(part)]
    found = state[
        f"transformer.h.{layer}.{ {'o': 'attn.c_proj', 'up': 'mlp.c_fc', 'down': 'mlp.c_proj'}[part] }.{kind}"
    ]
    return found.t() if kind == "weight" else found


def _bert(name: str, state: Mapping[str, Tensor], model: ModelSpec) -> Tensor:
    stem, _, kind = name.rpartition(".")
    top = {
        "embedding": "word_embeddings",
        "positions": "position_embeddings",
        "token_types": "token_type_embeddings",
        "embedding.norm": "LayerNorm",
    }
    if stem in top:
        return state[f"embeddings.{top[stem]}.{kind}"]
    layer, part = stem.removeprefix("layers.").split(".", 1)
    inner = {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp.norm": "output.LayerNorm",
    }
    return state[f"encoder.layer.{layer}.{inner[part]}.{kind}"]


def part_of(tensor: Tensor, shard: Shard) -> Tensor:
    """A rank's part, index by index."""
    rows = tensor[indices(shard.rows)]
    return rows if shard.cols is None else rows[:, indices(shard.cols)]


def allocated(
    model: ModelSpec, layout: Layout, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Views to fill, as a rank of the runtime has them (Q, K and V below each other in one tensor), and the tensors."""
    shards = parameters(model, layout, rank)
    views: dict[str, Tensor] = {}
    whole: list[Tensor] = []
    for names in stacks(shards).values():
        heights = [shards[name].local_shape[0] for name in names]
        shape = (sum(heights), *shards[names[0]].local_shape[1:])
        whole.append(torch.full(shape, float("nan"), dtype=dtype, device=device))
        views |= zip(names, whole[-1].split(heights), strict=True)
    return views, whole


class Meeting:
    """Where ranks that are threads exchange; `largest` is the most elements that one of them sent or got at once."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.largest = 0


class ThreadAxis(Axis):
    """An axis whose ranks are threads; what an all-to-all brings is checked against what is expected."""

    def __init__(self, ranks: Sequence[int], rank: int, meeting: Meeting) -> None:
        super().__init__("world", ranks, rank, None)
        self.meeting = meeting

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        if self.size == 1:
            return x
        found = [parts[self.index] for parts in self._met(x.split(list(send)))]
        assert [part.numel() for part in found] == list(receive)
        assert {part.dtype for part in found} == {x.dtype}
        self.meeting.largest = max(self.meeting.largest, x.numel(), sum(receive))
        return torch.cat(found)

    def all_reduce(self, x: Tensor, *, alike: bool = True) -> Tensor:
        return x if self.size == 1 else x.copy_(sum(part.clone() for part in self._met(x.clone())))

    def _met(self, mine: Any) -> list[Any]:
        self.meeting.barrier.wait()
        self.meeting.brought[self.index] = mine
        self.meeting.barrier.wait()
        return list(self.meeting.brought)


def run_ranks(ranks: Sequence[int], job: Callable[[ThreadAxis], Any]) -> list[Any]:
    """What each rank's job returns. The first exception of any of them is raised."""
    meeting, results, failures = Meeting(len(ranks)), [None] * len(ranks), []

    def serve(place: int) -> None:
        try:
            results[place] = job(ThreadAxis(ranks, ranks[place], meeting))
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except BaseException as error:
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@dataclass(frozen=True)
class Loaded:
    """What one rank has loaded, and how many bytes it read for that."""

    rank: int
    views: dict[str, Tensor]
    bytes_read: int
    largest: int


def load_everywhere(
    folder: Path,
    layout: Layout,
    dtype: str = "float32",
    stage_bytes: int = 700,
    *,
    ranks: Sequence[int] | None = None,
    change: Callable[[Opened], Mapping[str, Source]] = lambda source: source.sources,
) -> list[Loaded]:
    """What each rank of the layout loads, each from a checkpoint that it opens itself. `change` may spoil it."""

    def job(axis: ThreadAxis) -> Loaded:
        source, rank = opened(folder), axis.ranks[axis.index]
        with source.checkpoint as checkpoint:
            views, _ = allocated(source.model, layout, rank, TORCH[dtype])
            load(checkpoint, change(source), source.model, layout, axis, views, stage_bytes=stage_bytes)
        return Loaded(rank, views, checkpoint.bytes_read, axis.meeting.largest)

    return run_ranks(range(layout.ranks) if ranks is None else ranks, job)
