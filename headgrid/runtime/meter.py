"""Counts what a rank really does: live bytes of new tensors on any device, floating-point operations."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_attention_flops(q: Any, k: Any, v: Any, *args: object, out_val: object = None, **kwargs: object) -> int:
    """Scores and weighted sum of torch's fused CPU attention, which its own counter leaves out. Full square."""
    (b, h, s, d), length, u = q.shape, k.shape[2], v.shape[3]
    return 2 * b * h * s * length * (d + u)


_cpu_attention_flops._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode passes tensors, not shapes


def flop_counter() -> FlopCounterMode:
    """torch's counter of matrix products, complete for the kernels the runtime uses."""
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _cpu_attention_flops})


class LiveBytes(TorchDispatchMode):
    """Tracks tensors created inside the block. `peak_bytes` is the most that was alive at once.

    A tensor is counted from the operation that returns it until its storage is freed; views and in-place results
    are not new. Memory that an operation uses inside itself is not seen.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this torch loads its whole compiler in every rank, to keep it from compiling this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and account for its new storages."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            with self:
                return func.decompose(*args, **kwargs)
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                storage = x.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result
