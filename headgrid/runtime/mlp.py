"""The MLP up to its second product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.runtime.kernels import fused
from headgrid.runtime.quantised import Input, Rounded, Weight, linear
from headgrid.spec.model import ModelSpec


class Units:
    """activation(x W^T + bias), times the second half of the rows if the first is a gate."""

    def __init__(self, model: ModelSpec) -> None:
        """`model` says which activation, and whether there are gates."""
        self.model = model
        self._no_bias = torch.zeros(0)

    def __call__(self, x: Input, weight: Weight, bias: Tensor | None) -> Input:
        """x [T, D] -> [T, u], of weight [u, D] or, gate first, [2 u, D]; rounded to FP8 on the way if x was."""
        kind, gated = self.model.activation, self.model.gated_mlp
        if isinstance(x, Rounded):
            return Rounded(*fused.quantise(linear(x, weight, bias), kind, gated=gated), x.dtype)
        if not gated:
            return self._activated_linear(x, weight, bias)
        both = linear(x, weight, bias)
        if fused.usable(both):
            return fused.gate(both, kind)
        gate, up = both.chunk(2, dim=-1)
        del both
        activated = activation(gate, kind)
        return activated * up if torch.is_grad_enabled() else activated.mul_(up)

    def _activated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """cuBLASLt computes GELU's tanh form inside the matrix product, before it rounds (8 % faster on an H200 than a
        kernel of its own, and nearer to the exact value).
        """
        tanh = self.model.activation == "gelu_tanh"
        if x.is_cuda and tanh and not torch.is_grad_enabled() and isinstance(weight, Tensor):
            if bias is None:
                bias = self._no_bias = self._no_bias if len(self._no_bias) == len(weight) else x.new_zeros(len(weight))
            return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return activation(linear(x, weight, bias), self.model.activation)


def activation(x: Tensor, kind: str) -> Tensor:
    """An activation function of x, in place where no gradient needs it as it was."""
    kept = torch.is_grad_enabled()
    if kind == "silu":
        return F.silu(x, inplace=not kept)
    if kind == "relu":
        return F.relu(x, inplace=not kept)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return F.gelu(x, approximate=approximate) if kept else torch.ops.aten.gelu_(x, approximate=approximate)
