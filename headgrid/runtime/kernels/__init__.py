"""Triton kernels. Imported lazily: a machine without CUDA needs no Triton."""


def power_of_two(size: int) -> int:
    """The least power of two that is `size` or more: the extents of Triton's blocks."""
    return 1 << (size - 1).bit_length()
