"""Rotary positions of slices of heads (RoFormer, Su et al. 2021), in the rotate-half order of Hugging Face."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.layout.span import Spans, indices
from headgrid.spec.rope import Rope


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables cos and sin [positions, 1, pairs] for consecutive channels of a head, pairs (c, c + pairs) of `width`;
    channels behind the pairs do not turn.
    """

    cos: Tensor
    sin: Tensor
    width: int


def rotation(rope: Rope, channels: Spans, positions: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """The tables of a slice that holds these channels of every head: whole pairs, first halves first."""
    mine = torch.tensor([c for c in indices(channels) if c < rope.dim // 2], dtype=torch.int64)
    turns = torch.tensor(rope.frequencies(), dtype=torch.float64)[mine]
    angles = torch.arange(positions).double()[:, None, None] * turns
    cos, sin = ((f(angles) * rope.amplitude).to(device, dtype) for f in (torch.cos, torch.sin))
    return Rotation(cos, sin, len(indices(channels)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn channel pairs (c, c + p) in place. x [b, s, heads, w]; cos, sin [s, 1, p] or [b, s, 1, p], 2 p at most w."""
    p = cos.shape[-1]
    a, b = x[..., :p], x[..., p : 2 * p]
    turned = a * cos - b * sin
    b.mul_(cos).add_(a * sin)
    a.copy_(turned)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as a new tensor, for gradients."""
    p = cos.shape[-1]
    a, b = x[..., :p], x[..., p : 2 * p]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * p :]], dim=-1)
