"""Tiny models of every family with awkward heads, random weights, and attention that is anything but uniform."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

PAD, VOCABULARY = 0, 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 3,
    "intermediate_size": 70,
}
GEMMA = COMMON | {"sliding_window": 7, "query_pre_attn_scalar": 12}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "mistral": ("Mistral", COMMON | {"sliding_window": 7}),
    "qwen2": ("Qwen2", {key: value for key, value in COMMON.items() if key != "head_dim"}),
    "qwen3": ("Qwen3", COMMON),
    "gpt2": (
        "GPT2",
        {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        | {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256},
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "bert": (
        "Bert",
        {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "hidden_size", "intermediate_size")}
        | {"num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 64},
    ),
}


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The same weights for the same arguments, in every process."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**fields, **changes})
    auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    # torch's own attention would leave out the soft cap of Gemma 2's scores
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in model.named_parameters():
            draw = torch.randn(x.shape, generator=generator)
            if "norm" in key.lower() or "ln_" in key:
                x.add_(draw, alpha=0.1)
            else:
                x.copy_(draw * (0.1 if x.dim() == 1 else _deviation(key, x)))
    return model


def _deviation(key: str, x: Tensor) -> float:
    """Scores of a few units: queries and keys twice as large as keeps their inputs' size."""
    sensitive = any(part in key for part in ("q_proj", "k_proj", "c_attn", "query", "key"))
    outside = any(part in key for part in ("embed", "wte", "wpe", "lm_head"))
    return 0.3 if outside else (2.0 if sensitive else 1.0) / 48**0.5


def prompts(lengths: tuple[int, ...] = (20, 13, 4), seed: int = 1) -> dict[str, Tensor]:
    """Random texts of these lengths, padded on the left."""
    longest, generator = max(lengths), torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (len(lengths), longest), generator=generator)  # some models have no more
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """As generate counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
