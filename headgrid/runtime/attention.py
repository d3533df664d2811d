"""Attention of one rank, without communication: prefill over fresh keys, decode over the cache."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headgrid.layout.activations import plain_rows
from headgrid.runtime.kernels import split_kv

_FAST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Position:
    """The position of decode's query, which is also the last key: on the host, and on the device for CUDA graphs."""

    host: int
    device: Tensor


def prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention. q [b, s, H, d], k [b, s, K, d], v [b, s, K, u], H a multiple of K; returns [b, s, H, u]."""
    if not q.is_cuda and k.shape[-1] != v.shape[-1]:
        return _plain(q, k, v, scale, causal=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    backend = sdpa_kernel(_FAST_FIRST, set_priority=True) if q.is_cuda else nullcontext()
    with backend:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Position, scale: float) -> Tensor:
    """One query for each sequence over keys 0..position.

    q [b, 1, H, d], k_cache [b, S, K, d], v_cache [b, S, K, u]; returns [b, 1, H, u].
    """
    if q.is_cuda:
        return split_kv.decode(q, k_cache, v_cache, position.device, scale)
    k, v = (cache[:, : position.host + 1] for cache in (k_cache, v_cache))
    if k.shape[-1] != v.shape[-1]:
        return _plain(q, k, v, scale, causal=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    """Attention by its definition, for a CPU where V's heads are narrower than K's: torch's fused kernel wants
    equal widths there, and its fallback holds several copies of all scores.

    q [b, s, H, d], k [b, S, K, d], v [b, S, K, u] -> [b, s, H, u]; 16-bit inputs are computed in fp32. Scores are
    held for one sequence and `plain_rows` queries at a time.
    """
    (b, s, heads, _), length, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(b, s, heads, v.shape[3])
    for i in range(b):
        keys, values = (
            (x[i] if group == 1 else x[i].repeat_interleave(group, 1)).transpose(0, 1).to(wide) for x in (k, v)
        )
        for start in range(0, s, step := plain_rows(heads, s, length)):
            rows = q[i, start : start + step].transpose(0, 1).to(wide)
            scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)
            if causal:
                future = torch.ones(rows.shape[1], length, dtype=torch.bool, device=q.device).triu_(start + 1)
                scores.masked_fill_(future, float("-inf"))
                del future
            weights = torch.softmax(scores, dim=-1)
            del scores
            out[i, start : start + step] = torch.bmm(weights, values).transpose(0, 1)
            del weights  # or the next block would hold both
        del keys, values
    return out


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Position | None) -> None:
    """Write keys and values [b, s, K, d] into the cache [b, S, K, d]: from 0 on, or at `position` (s = 1)."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        if position is None:
            cache[:, : new.shape[1]] = new
        else:
            cache.index_copy_(1, position.device, new)


def empty_result(q: Tensor, v: Tensor) -> Tensor:
    """What attention gives for no sequences: [0, s, H, dv]."""
    return torch.empty(0, q.shape[1], q.shape[2], v.shape[3], dtype=q.dtype, device=q.device)
