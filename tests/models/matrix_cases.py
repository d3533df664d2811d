"""Which models run on which layouts: small ones of every family with heads that divide badly."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hf_variants import FULL, SLIDING, Variant, build
from torch import Tensor

from headgrid.layout.layout import EXCHANGES, parse_layout

LAYERS, VOCABULARY, POSITIONS, NEW_TOKENS = 2, 97, 320, 256
RANKS = (2, 4, 6, 8)


def _sizes(heads: int, kv_heads: int, head_dim: int, hidden: int, inner: int) -> dict[str, Any]:
    """Of a family since Llama. The width of all heads together need not be the hidden size."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "max_position_embeddings": POSITIONS,
    }


_THETA = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 80}
_LLAMA3 = _THETA | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 2.5}
_YARN = _THETA | {"rope_type": "yarn"}
_LINEAR = {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0}
_BY_KIND = {FULL: _LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
_GEMMA = {"query_pre_attn_scalar": 20}
_LAYERS = {"layer_types": [SLIDING, FULL], "sliding_window": 8}
_GPT2 = {"n_embd": 60, "n_layer": LAYERS, "n_head": 6, "n_positions": POSITIONS, "n_inner": 53}
_GPT2 |= {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
_NOT_OF_BERT = ("num_key_value_heads", "head_dim")
_BERT = {key: value for key, value in _sizes(6, 6, 10, 60, 53).items() if key not in _NOT_OF_BERT}
VARIANTS = {
    "llama": Variant("llama", "matrix", _sizes(6, 2, 10, 60, 52) | {"rope_parameters": _LLAMA3}),
    "mistral": Variant("mistral", "matrix", _sizes(5, 1, 18, 45, 53) | {"sliding_window": 11}),
    "qwen2": Variant("qwen2", "matrix", _sizes(14, 2, 10, 70, 61) | _WINDOWS | {"rope_parameters": _YARN}),
    "qwen3": Variant("qwen3", "matrix", _sizes(6, 3, 18, 50, 54) | {"rope_parameters": _LINEAR}),
    "gemma2": Variant("gemma2", "matrix", _sizes(5, 1, 18, 50, 50) | _GEMMA | _CAPS | {"sliding_window": 7}),
    "gemma3_text": Variant(
        "gemma3_text", "matrix", _sizes(6, 2, 14, 66, 50) | _GEMMA | _LAYERS | {"rope_parameters": _BY_KIND}
    ),
    "gpt2": Variant("gpt2", "matrix", _GPT2),
    "bert": Variant("bert", "matrix", _BERT),
}
FAMILIES = tuple(VARIANTS)
DECODERS = tuple(family for family in FAMILIES if family != "bert")
_PROMPTS = ((29, 13, 40, 22), (31, 1, 17, 44, 9), (12, 38, 27))
"""Lengths of prompts: more and fewer sequences than slices, shorter and longer than windows."""
_GRIDS = {
    "llama": ("n1m2", "n2m2", "n2m3", "n2m4"),
    "mistral": ("n1m2", "n1m4", "n1m6", "n1m8"),
    "qwen2": ("n1m2", "n1m4", "n2m3", "n2m4"),
    "qwen3": ("n1m2", "n1m4", "n3m2", "n1m8"),
    "gemma2": ("n1m2", "n1m4", "n1m6", "n1m8"),
    "gemma3_text": ("n1m2", "n2m2", "n1m6", "n2m4"),
    "gpt2": ("n1m2", "n2m2", "n3m2", "n2m4"),
    "bert": ("n1m2", "n1m4", "n3m2", "n2m4"),
}
"""Head groups x slices for each of RANKS. Pairs of channels are 5, 7 or 9, so most slices are uneven."""


@dataclass(frozen=True)
class MatrixCase:
    family: str
    layout: str

    @property
    def ranks(self) -> int:
        return parse_layout(self.layout).ranks

    @property
    def id(self) -> str:
        return f"{self.family}-{self.layout}"


OTHERS = tuple(
    MatrixCase(*pair)
    for pair in (
        ("llama", "n1m3pp2:scores"),
        ("llama", "n2m2pp2:sequence+sharded"),
        ("llama", "tp6"),
        ("mistral", "n1m4:scores+concat"),
        ("mistral", "n1m2pp2dp2:batch"),
        ("qwen2", "n2m2dp2:batch+gathered+sharded"),
        ("qwen2", "n2m3:gather+concat"),
        ("qwen3", "tp3pp2"),
        ("qwen3", "n3m2:sequence+sharded"),
        ("gemma2", "n1m3pp2:batch+gathered"),
        ("gemma2", "n1m2pp2dp2:sequence"),
        ("gemma3_text", "n1m3dp2:gather+sharded"),
        ("gemma3_text", "n2m2pp2:scores"),
        ("gpt2", "n3m2:batch+gathered"),
        ("gpt2", "n2m2:gather+concat+fp32"),
        ("gpt2", "dp4"),
        ("bert", "n3m2:gather+concat"),
        ("bert", "n1m2pp2dp2:batch+sharded"),
        ("bert", "n2m4:batch+gathered"),
    )
)
"""Stages, replicas, gathered weights, concatenated outputs, sharded hidden states, plain tensor parallelism."""
SAMPLE = tuple(
    MatrixCase(*pair)
    for pair in (
        ("llama", "n1m2:gather"),
        ("gemma2", "n1m2:batch"),
        ("mistral", "n1m4:sequence"),
        ("gpt2", "n2m2:gather+concat+fp32"),
        ("qwen3", "n3m2:batch+gathered"),
        ("gemma3_text", "n1m6:scores"),
        ("qwen2", "n2m2pp2:sequence+sharded"),
        ("bert", "n2m4:scores"),
    )
)
"""What `make test` runs: every family, every exchange twice, every number of ranks twice."""


def everything() -> tuple[MatrixCase, ...]:
    """Every family x exchange x number of ranks, and some other layouts; those of as many ranks together."""
    cases = [MatrixCase(f, f"{grid}:{exchange}") for f in FAMILIES for grid in _GRIDS[f] for exchange in EXCHANGES]
    return tuple(sorted(dict.fromkeys((*cases, *SAMPLE, *OTHERS)), key=lambda case: case.ranks))


def prompts(family: str) -> list[list[int]]:
    """Random ids of different lengths."""
    place = FAMILIES.index(family)
    generator = torch.Generator().manual_seed(place)
    lengths = _PROMPTS[place % len(_PROMPTS)]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def whole_model(family: str) -> Any:
    """The model as transformers has it, fp32, with its eager attention.

    Tied embeddings are small: large ones outweigh all that layers add to them, and every token repeats the last one.
    """
    model = build(VARIANTS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                parameter.mul_(_TIED.get(family, 1.0))
    return model


_TIED = {"gemma2": 0.3, "gemma3_text": 0.1, "gpt2": 0.3}


@torch.no_grad()
def outputs(model: Any, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence; an encoder's hidden states [tokens, hidden size]."""
    found = model(torch.tensor([ids]))
    return (found.logits if "logits" in found else found.last_hidden_state)[0]


@dataclass(frozen=True)
class Truth:
    """A family's model, saved, and what transformers makes of it alone."""

    folder: Path
    model: Any
    prompts: list[list[int]]

    @torch.no_grad()
    def continuations(self) -> list[list[int]]:
        """Greedy tokens behind each prompt by transformers' own `generate` with its cache, all prompts together,
        padded on the left.
        """
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in self.prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in self.prompts])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


def truths(folder: Path) -> Callable[[str], Truth]:
    """The truth of a family, made when it is first asked for."""

    @cache
    def find(family: str) -> Truth:
        model = whole_model(family)
        model.save_pretrained(folder / family)
        return Truth(folder / family, model, prompts(family))

    return find
