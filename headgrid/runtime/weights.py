"""Weights drawn by global element index: any rank can draw any slice, and no rank ever holds a whole matrix.

Element e of tensor `name` is a uniform variable made from a hash of (seed, name, e), the same bits on every device.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headgrid.layout.shards import Shard
from headgrid.layout.span import Span, indices
from headgrid.runtime.hashing import key_of, uniform
from headgrid.spec.model import ModelSpec

_CHUNK = 1 << 23  # elements hashed at a time: bounds the int64 temporaries to a few hundred MB


def distribution(model: ModelSpec, name: str) -> tuple[float, float]:
    """Mean and standard deviation of the elements of tensor `name`."""
    part, kind = name.split(".")[-2:]
    stored = -1.0 if model.norm_unit_offset else 0.0
    if part in ("q_norm", "k_norm"):  # scores of normed heads have a deviation of the product of both means
        return model.attention_gain + stored, 0.1 * model.attention_gain
    if part in ("norm", "post_norm"):  # not constant, so that a norm applied to the wrong channels shows
        return (1.0 + stored, 0.1) if kind == "weight" else (0.0, 0.1)
    if kind == "bias":
        return 0.0, 0.1
    residual = math.sqrt(2 * model.num_layers)  # keeps the residual's size independent of depth (GPT-2)
    std = {
        "embedding": (1.0 if not model.tied_embeddings else 1 / math.sqrt(model.hidden_size)) / model.embedding_scale,
        "positions": 0.3,
        "token_types": 0.3,
        "q": model.attention_gain / math.sqrt(model.hidden_size),
        "k": model.attention_gain / math.sqrt(model.hidden_size),
        "v": 1 / math.sqrt(model.hidden_size),
        "o": 1 / math.sqrt(model.num_heads * model.head_dim) / residual,
        "gate": 1 / math.sqrt(model.hidden_size),
        "up": 1 / math.sqrt(model.hidden_size),
        "down": 2 / math.sqrt(model.mlp_hidden_size) / residual,
        "head": 1 / math.sqrt(model.hidden_size),
    }[part]
    return 0.0, std


def _pieces(rows: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step]


def draw(
    model: ModelSpec, seed: int, name: str, shard: Shard, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """The rank's part of tensor `name`: shape `shard.local_shape`, the same values on every device and layout."""
    mean, std = distribution(model, name)
    scale, key = std * math.sqrt(3.0), key_of(seed, name)  # a uniform variable on (-1, 1) has variance 1/3
    rows = torch.tensor(indices(shard.rows), dtype=torch.int64, device=device)
    cols = torch.tensor(indices(shard.cols or (Span(0, 1),)), dtype=torch.int64, device=device)
    width = shard.shape[1] if shard.cols is not None else 1
    local = torch.empty(len(rows), len(cols), dtype=dtype, device=device)
    for start, piece in _pieces(rows, len(cols)):
        values = uniform(piece[:, None] * width + cols, key)
        local[start : start + len(piece)] = values.mul_(scale).add_(mean).to(dtype)
    return local.reshape(shard.local_shape)


def whole(shape: Sequence[int]) -> Shard:
    """The shard that is the whole tensor (for the single-device reference)."""
    spans = [(Span(0, size),) for size in shape]
    return Shard(tuple(shape), spans[0], spans[1] if len(spans) > 1 else None)
