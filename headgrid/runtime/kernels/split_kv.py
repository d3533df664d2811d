"""One-query attention that splits the keys, so that the cache is read at memory speed whatever the batch.

SDPA does not split the KV length for a single query: with few (sequence, KV head) pairs most of the GPU idles.
Here each program reads an equal share of the keys of one pair, for all query heads that share it, and leaves a partial
output with its log-sum-exp; a second kernel merges these in fp32 (FlashDecoding; Dao et al. 2023). The length is read
on the device, so that one CUDA graph serves every step.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headgrid.runtime.kernels import power_of_two

LEAST_KEYS = 64  # of a split; fewer take longer to merge than to read


@dataclass(frozen=True, slots=True)
class Plan:
    """How the kernels are launched: `splits` programs for each pair of sequence and KV head.

    A program reads `block` keys at a time, by `warps` warps that load `stages` - 1 blocks ahead. One that merges takes
    a query head, and up to `columns` of its channels. `chained`: the first kernel too is launched before the one ahead
    of it has ended, if that one allows it (programmatic dependent launch; the merging kernel always is). It can then
    call the first `ahead` keys of each split, and their values, into the L2 cache before it waits for that end, and
    with one stage loads its first block after the wait by the position from before it, again if that has changed since.
    """

    splits: int
    block: int
    warps: int
    stages: int
    columns: int = 256
    chained: bool = False
    ahead: int = 0


def plan(
    pairs: int, capacity: int, group: int, bytes_per_key: int, processors: int, shared_bytes: int = 227 << 10
) -> Plan:
    """The launch for so many pairs with `group` query heads each, and a cache of `capacity` keys each, on a GPU of so
    many multiprocessors with so much shared memory each. `bytes_per_key`: a key and its value, of one pair.

    Fitted to a sweep of `benchmarks/decode_kernel.py` on an H200: two waves of small programs with 64 KB in flight each
    are at most 3 % slower than the best in nearly every case. Where few pairs have many query heads, whose parts take
    long to merge, half as many programs with twice as much in flight are faster, and calling their first keys early
    saves 3 to 10 %; elsewhere that delays the kernel ahead by as much.
    """
    columns, rows = 32 if pairs * group <= processors else 256, _padded(group)
    warps = 2 if rows * bytes_per_key <= 1 << 14 else 4 if rows * bytes_per_key <= 1 << 16 else 8  # for registers
    blocks = -(-capacity // 128)
    if group > 2 * pairs and rows <= 32 and bytes_per_key <= 512 and processors / 3 < blocks * pairs <= processors:
        return Plan(blocks, 128, 8, 1, 64, chained=True, ahead=128)  # too short for a loop: one block each
    if group > 2 * pairs and shared_bytes >= 200 << 10:
        splits = max(1, min(processors // pairs, 96, -(-capacity // 160)))
        kilobytes = 64 if -(-capacity // splits) >= 512 else 32
        return Plan(splits, _block(kilobytes, bytes_per_key, rows), max(warps, 4), 3, columns, chained=True, ahead=64)
    splits = max(1, min(round(2 * processors / pairs), -(-capacity // LEAST_KEYS)))
    if rows == 32 and bytes_per_key == 512 and splits > 1:
        return Plan(splits, 64, 4, 3, columns, chained=True, ahead=160)
    return Plan(splits, _block(16, bytes_per_key, rows), warps, 4 if bytes_per_key <= 1024 else 2, columns)


def _block(kilobytes: int, bytes_per_key: int, rows: int) -> int:
    """How many keys with their values fill so much, and have room for the scores of so many rows: a power of two that
    a tensor core's tile takes.
    """
    keys = min((kilobytes << 10) // bytes_per_key, 128, 4096 // rows)
    return max(16, 1 << keys.bit_length() - 1)


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
    launch: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """q [b, 1, H, d], k_cache [b, S, K, d], v_cache [b, S, K, u], positions int64 [b] of the queries.

    Key t stands at position `first` + `stride` t; those up to a query's own position are attended to, or the last
    `window` of these. Returns [b, 1, H, u] and the natural log-sum-exp [b, 1, H] in fp32; as a `part` the former is
    fp32 too, and 0 with -inf where no key is seen. They are `out` and (contiguous) `lse` where these are given, which
    have these shapes and dtypes. Any d and u up to 256, any number of query heads for each KV head; strides may be any
    with a dense last dim.
    """
    (b, _, heads, d), kv_heads, u = q.shape, k_cache.shape[2], v_cache.shape[3]
    shape, dtype = (b, 1, heads, u), torch.float32 if part else q.dtype
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=q.device)
    assert out.shape == shape and out.dtype == dtype and out.stride(3) == 1, (out.shape, out.dtype, out.stride())
    if lse is None:
        lse = torch.empty(b, 1, heads, dtype=torch.float32, device=q.device)
    assert lse.shape == (b, 1, heads) and lse.dtype == torch.float32 and lse.is_contiguous(), (lse.shape, lse.dtype)
    if b:
        group, chip = heads // kv_heads, _chip(q.device)
        how = launch or plan(
            b * kv_heads, k_cache.shape[1], group, (d + u) * q.element_size(), chip.processors, chip.shared_bytes
        )
        _launch(q, (k_cache, v_cache), (out, lse), positions, scale, softcap, (window, first, stride), how)
    return out, lse


def _launch(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    positions: Tensor,
    scale: float,
    softcap: float,
    seen: tuple[int, int, int],
    how: Plan,
) -> None:
    """Both kernels, or the first alone where it has nothing to merge."""
    from headgrid.runtime.kernels import split_kv_triton  # Triton exists only where there is a GPU

    kernels: Any = split_kv_triton
    (b, _, heads, d), (_, _, kv_heads, u) = q.shape, caches[1].shape
    several, group = how.splits > 1, heads // kv_heads
    early = _chip(q.device).launches_early
    lines = all(n * q.element_size() % 16 == 0 for x in caches for n in (*x.stride()[:3], x.shape[3]))
    parts = torch.empty(b * heads, how.splits if several else 0, u, dtype=torch.float32, device=q.device)
    lses = torch.empty(parts.shape[:2], dtype=torch.float32, device=q.device)
    tensors = (parts, lses, *results, positions, results[0].stride(0), results[0].stride(2))
    division = (heads, how.splits, LEAST_KEYS, *seen)
    kernels.partial[(b * kv_heads, how.splits)](
        q, *caches, *tensors, scale, softcap, q.stride(0), q.stride(2),
        *(x.stride(dim) for x in caches for dim in (0, 2, 1)), *division,
        caches[0].shape[1], how.ahead,
        CAPPED=softcap > 0, GROUP=group, D=d, U=u, GROUP_PADDED=_padded(group), D_PADDED=_padded(d),
        U_PADDED=_padded(u), BLOCK=how.block, STAGES=how.stages, SEVERAL=several, EARLY=early,
        CHAINED=early and how.chained, AHEAD=lines and how.ahead > 0,
        GUESSED=early and how.chained and lines and how.ahead > 0 and how.stages == 1, THREADS=32 * how.warps,
        WIDE=not q.is_cuda and q.dtype == torch.bfloat16,
        num_warps=how.warps, **_early(early and how.chained),
    )  # fmt: skip
    if several:
        columns = min(_padded(u), how.columns)
        chunk = min(power_of_two(how.splits), 8192 // columns)
        kernels.merge[(b * heads, -(-u // columns))](
            *tensors, *division, U=u, COLUMNS=columns, CHUNK=chunk, EARLY=early,
            num_warps=min(4, max(1, chunk * columns // 1024)), **_early(early),
        )  # fmt: skip


def _early(yes: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if yes else {}


@dataclass(frozen=True, slots=True)
class _Chip:
    processors: int = 4
    shared_bytes: int = 227 << 10
    launches_early: bool = False


@cache
def _chip(device: torch.device) -> _Chip:
    """What decides on a launch: the GPU's own, or a few numbers for Triton's interpreter on a CPU."""
    if device.type != "cuda":
        return _Chip()
    chip = torch.cuda.get_device_properties(device)
    return _Chip(chip.multi_processor_count, chip.shared_memory_per_block_optin, chip.major >= 9)


def _padded(size: int) -> int:
    """The least extent of a tensor core's tile that holds `size`: a power of two, 16 or more."""
    return max(16, power_of_two(size))
