"""FP8 linears: which matrices are stored as e4m3 with one fp32 scale for each output row, and the bytes of that.

The scale of an output row is that of the whole row, so that the stored numbers are the same bits in every layout.
"""

from headgrid.layout.layout import Layout
from headgrid.layout.shards import Shard

FP8_BYTES, SCALE_BYTES = 1, 4
_MATRICES = frozenset({"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"})


def is_quantised(layout: Layout, name: str) -> bool:
    """Whether the tensor `name`, global or stacked as it is stored, is a matrix in FP8."""
    part, kind = ("", *name.split("."))[-2:]
    return layout.linears == "fp8" and kind == "weight" and part in _MATRICES


def rows_are_cut(layout: Layout, name: str) -> bool:
    """Whether the ranks that share a layer hold different parts of each output row of a matrix."""
    part = name.split(".")[-2]
    return part == "down" or (part == "o" and (layout.output, layout.attention) == ("reduce", "cut"))


def scale_name(name: str) -> str:
    """Where the scales of the matrix `name` are stored."""
    return f"{name.removesuffix('.weight')}.scale"


def scale_bytes(shard: Shard) -> int:
    """Bytes of the scales of a matrix's part."""
    return shard.local_shape[0] * SCALE_BYTES


def stored_bytes(layout: Layout, name: str, shard: Shard, element_bytes: int) -> int:
    """Bytes of a rank's part of the tensor `name`, with its scales; `element_bytes` is that of the model's dtype."""
    if is_quantised(layout, name):
        return shard.num_elements * FP8_BYTES + scale_bytes(shard)
    return shard.num_elements * element_bytes
