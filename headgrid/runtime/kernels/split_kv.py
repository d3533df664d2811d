"""One-query attention that splits the keys, so that the cache is read at memory speed whatever the batch.

SDPA does not split the KV length for a single query: with few (sequence, KV head) pairs most of the GPU idles.
Here each program reads one block of keys of one pair, for all query heads that share it, and leaves a partial
output with its log-sum-exp; a second kernel merges them in fp32 (FlashDecoding; Dao et al. 2023).
The length is read on the device, so that one CUDA graph serves every step.
"""

import torch
from torch import Tensor

_KEYS_PER_SPLIT = 2048


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, scale: float) -> Tensor:
    """q [b, 1, H, d], k_cache [b, K, S, d], v_cache [b, K, S, u], position int64 [1]; returns [b, 1, H, u].

    Keys 0..position are attended to. d and u are powers of two up to 256; strides may be any with a dense last dim.
    """
    from headgrid.runtime.kernels.split_kv_triton import merge, partial  # Triton exists only where there is a GPU

    b, _, heads, d = q.shape
    kv_heads, capacity, u = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    splits = -(-capacity // _KEYS_PER_SPLIT)
    parts = torch.empty(b, heads, splits, u, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(b, 1, heads, u, dtype=q.dtype, device=q.device)
    partial[(b * kv_heads, splits)](
        q, k_cache, v_cache, parts, lse, position, scale * 1.4426950408889634,
        q.stride(0), q.stride(2), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        kv_heads, splits,
        GROUP=group, GROUP_PADDED=max(16, 1 << (group - 1).bit_length()), D=d, U=u,
        KEYS=_KEYS_PER_SPLIT, BLOCK=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    merge[(b * heads,)](parts, lse, out, splits, U=u, SPLITS=max(2, 1 << (splits - 1).bit_length()))
    return out
