"""Triton kernels. Imported lazily: a machine without CUDA needs no Triton."""

from functools import cache

import torch


def power_of_two(size: int) -> int:
    """The least power of two that is `size` or more: the extents of Triton's blocks."""
    return 1 << (size - 1).bit_length()


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel there may be launched before the one ahead of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def chained(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that is launched early where it can be, and waits before it reads what others write."""
    return {"EARLY": True, "launch_pdl": True} if launches_early(device) else {"EARLY": False}
