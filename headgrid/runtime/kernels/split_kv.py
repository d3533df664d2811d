"""One-query attention that splits the keys, so that the cache is read at memory speed whatever the batch.

SDPA does not split the KV length for a single query: with few (sequence, KV head) pairs most of the GPU idles.
Here each program reads an equal share of the keys of one pair, for all query heads that share it, and leaves a partial
output with its log-sum-exp; these are merged in fp32 (FlashDecoding; Dao et al. 2023) by the programs that end last.
The length is read on the device, so that one CUDA graph serves every step.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Merging = Literal["arrive", "early", "after"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the kernel is launched: `splits` programs for each pair of sequence and KV head.

    A split takes `least` keys or more, `block` at a time, by `warps` warps that load `stages` - 1 blocks ahead. Parts
    are merged by the last `shares` programs to `arrive`, or by a kernel launched `early` (programmatic dependent
    launch) or `after`, `shares` programs for each pair.
    """

    splits: int
    block: int
    warps: int
    stages: int
    shares: int = 1
    least: int = 64
    merging: Merging = "arrive"


def plan(pairs: int, capacity: int, group: int, bytes_per_key: int, processors: int) -> Plan:
    """The launch for so many pairs with `group` query heads each, and a cache of `capacity` keys each."""
    block = 64 if bytes_per_key <= 1024 else 32
    stages = 3 if bytes_per_key <= 1024 else 2
    most = max(1, -(-capacity // 64))
    splits = min(most, max(1, -(-2 * processors // pairs)), 256)
    return Plan(splits, block, 4, stages)


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
    launch: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, 1, H, d], k_cache [b, S, K, d], v_cache [b, S, K, u], positions int64 [b] of the queries.

    Key t stands at position `first` + `stride` t; those up to a query's own position are attended to, or the last
    `window` of these. Returns [b, 1, H, u] and the natural log-sum-exp [b, 1, H] in fp32; as a `part` the former is
    fp32 too, and 0 with -inf where no key is seen. Any d and u up to 256, any number of query heads for each KV head;
    strides may be any with a dense last dim.

    Calls on one device take turns, on one stream or ordered by events: they share the counts of arrived programs.
    """
    from headgrid.runtime.kernels import split_kv_triton  # Triton exists only where there is a GPU

    kernels: Any = split_kv_triton
    b, _, heads, d = q.shape
    capacity, kv_heads, u = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    pairs, group = b * kv_heads, heads // kv_heads
    how = launch or plan(pairs, capacity, group, (d + u) * q.element_size(), _processors(q.device))
    parts = torch.empty(pairs, how.splits, group, u, dtype=torch.float32, device=q.device)
    lses = torch.empty(pairs, how.splits, group, dtype=torch.float32, device=q.device)
    out = torch.empty(b, 1, heads, u, dtype=torch.float32 if part else q.dtype, device=q.device)
    lse = torch.empty(b, 1, heads, dtype=torch.float32, device=q.device)
    shares, sizes = _shares(group, u, how)
    sizes |= {"GROUP": group, "U": u}
    division = (kv_heads, how.splits, how.least, window, first, stride)
    kernels.partial[(pairs, how.splits)](
        q, k_cache, v_cache, parts, lses, out, lse, _arrivals(q.device), positions, scale, softcap,
        q.stride(0), q.stride(2), k_cache.stride(0), k_cache.stride(2), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(2), v_cache.stride(1), *division,
        CAPPED=softcap > 0, D=d, GROUP_PADDED=_padded(group), D_PADDED=_padded(d), U_PADDED=_padded(u), SHARES=shares,
        BLOCK=how.block, STAGES=how.stages, ARRIVE=how.merging == "arrive", EARLY=how.merging == "early",
        WIDE=not q.is_cuda and q.dtype == torch.bfloat16, **sizes, num_warps=how.warps,
    )  # fmt: skip
    if how.splits > 1 and how.merging != "arrive":
        early = how.merging == "early"
        kernels.merge[(pairs, shares)](
            parts, lses, out, lse, positions, *division, **sizes, EARLY=early, num_warps=how.warps, launch_pdl=early
        )
    return out, lse


def _shares(group: int, u: int, how: Plan) -> tuple[int, dict[str, int]]:
    """Into how many shares a pair's heads and channels are cut for the merge, and what a program merges at a time:
    [CHUNK splits, ROWS heads, COLS channels].
    """
    rows, cols = _ceil_power(group), _padded(u)
    wanted = how.shares
    while wanted > 1 and rows > 1:
        wanted, rows = wanted // 2, rows // 2
    while wanted > 1 and cols > 16:
        wanted, cols = wanted // 2, cols // 2
    chunk = max(1, 2048 * how.warps // (rows * cols))
    return -(-group // rows) * -(-u // cols), {"ROWS": rows, "COLS": cols, "CHUNK": chunk}


@cache
def _arrivals(device: torch.device) -> Tensor:
    """A count for each pair of sequence and KV head, 0 between calls."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _padded(size: int) -> int:
    """The least extent of a tensor core's tile that holds `size`: a power of two, 16 or more."""
    return max(16, _ceil_power(size))


def _ceil_power(size: int) -> int:
    return 1 << (size - 1).bit_length()
