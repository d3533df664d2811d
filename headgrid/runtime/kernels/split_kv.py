"""One-query attention that splits the keys, so that the cache is read at memory speed whatever the batch.

SDPA does not split the KV length for a single query: with few (sequence, KV head) pairs most of the GPU idles.
Here each program reads one block of keys of one pair, for all query heads that share it, and leaves a partial
output with its log-sum-exp; a second kernel merges them in fp32 (FlashDecoding; Dao et al. 2023).
The length is read on the device, so that one CUDA graph serves every step.
"""

from typing import Any

import torch
from torch import Tensor

_KEYS_PER_SPLIT = 2048


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    first: int = 0,
    stride: int = 1,
    part: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [b, 1, H, d], k_cache [b, S, K, d], v_cache [b, S, K, u], positions int64 [b] of the queries.

    Key t stands at position `first` + `stride` t; those up to a query's own position are attended to, or the last
    `window` of these. Returns [b, 1, H, u] and the natural log-sum-exp [b, 1, H] in fp32; as a `part` the former is
    fp32 too, and 0 with -inf where no key is seen. Any d and u up to 256, any number of query heads for each KV head;
    strides may be any with a dense last dim.
    """
    from headgrid.runtime.kernels import split_kv_triton  # Triton exists only where there is a GPU

    kernels: Any = split_kv_triton
    b, _, heads, d = q.shape
    capacity, kv_heads, u = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    splits = max(1, -(-capacity // _KEYS_PER_SPLIT))
    parts = torch.empty(b, heads, splits, u, dtype=torch.float32, device=q.device)
    lses = torch.empty(b, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(b, 1, heads, u, dtype=torch.float32 if part else q.dtype, device=q.device)
    lse = torch.empty(b, 1, heads, dtype=torch.float32, device=q.device)
    kernels.partial[(b * kv_heads, splits)](
        q, k_cache, v_cache, parts, lses, positions, scale, softcap,
        q.stride(0), q.stride(2), k_cache.stride(0), k_cache.stride(2), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(2), v_cache.stride(1),
        kv_heads, splits, window, first, stride,
        CAPPED=softcap > 0, GROUP=group, D=d, U=u,
        GROUP_PADDED=_padded(group), D_PADDED=_padded(d), U_PADDED=_padded(u),
        KEYS=_KEYS_PER_SPLIT, BLOCK=64, num_warps=4, num_stages=2 if q.element_size() == 4 else 3,
    )  # fmt: skip
    kernels.merge[(b * heads,)](parts, lses, out, lse, splits, U=u, U_PADDED=_padded(u), SPLITS=_padded(splits))
    return out, lse


def _padded(size: int) -> int:
    """The least extent of a tensor core's tile that holds `size`: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
