"""Random numbers by index: splitmix64 (Steele, Lea, Flood 2014) of (key, index), so that any rank can draw any element.

Only integer operations and exact conversions are used: a CPU and a GPU draw the same bits.
"""

import hashlib

import torch
from torch import Tensor


def key_of(seed: int, name: str) -> int:
    """64 bits, in [0, 2^64), for what is drawn under `name` from `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch shifts arithmetically; a new tensor."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mixed(z: Tensor) -> Tensor:
    """The finalizer of splitmix64: a bijection of int64 after which every bit depends on every bit of `z`."""
    z = _shift_right(z, 30).bitwise_xor_(z).mul_(signed(0xBF58476D1CE4E5B9))
    z = _shift_right(z, 27).bitwise_xor_(z).mul_(signed(0x94D049BB133111EB))
    return _shift_right(z, 31).bitwise_xor_(z)


def _bits(index: Tensor, key: int | Tensor) -> Tensor:
    """Element `index` of the stream `key`: 64 random bits as int64, of the shape to which both broadcast."""
    return mixed(index * signed(0x9E3779B97F4A7C15) + (signed(key) if isinstance(key, int) else key))


def uniform(index: Tensor, key: int | Tensor) -> Tensor:
    """float32 in (-1, 1), symmetric, 2^24 equidistant values; `index` int64, `key` a number or int64."""
    return (_shift_right(_bits(index, key), 40) - (1 << 23)).to(torch.float32).add_(0.5).div_(1 << 23)


def unit(index: Tensor, key: int | Tensor) -> Tensor:
    """float64 in (0, 1), symmetric about 1/2, 2^52 equidistant values, neither 0 nor 1; arguments as of `uniform`."""
    return _shift_right(_bits(index, key), 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
