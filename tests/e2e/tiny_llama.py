"""A Llama of 6 heads and 2 KV heads whose attention is far from uniform."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write(folder: Path, vocab_size: int) -> LlamaForCausalLM:
    """Draw it, save it in `folder` and return it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, (3.0 if "q_proj" in name or "k_proj" in name else 1.0) / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return model
