"""The plain single-device transformer: the oracle that every layout must agree with.

It shares no code with `runtime` and is itself checked against transformers. It is written to be obviously right,
not fast: whole matrices, one layer at a time, explicit softmax, any dtype. In float64 it is the truth; in the dtype
of a run it is the noise floor that a layout's error is compared with.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.spec.model import ModelSpec

GetWeight = Callable[[str], Tensor]
"""The whole tensor of a global name, in any dtype and on any device; called once for each tensor."""

_SCORE_ELEMENTS = 1 << 26  # scores held at a time: 512 MiB in float64


class Reference:
    """A model on one device, its weights fetched layer by layer, so that only one layer is held at a time."""

    def __init__(
        self, model: ModelSpec, get: GetWeight, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """`get(name)` returns whole weights; they are converted to `dtype` on `device`."""
        self.model, self.dtype, self.device = model, dtype, torch.device(device)
        self._fetch = get

    def _get(self, name: str) -> Tensor:
        return self._fetch(name).to(self.device, self.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._get(f"{name}.bias") if self.model.linear_bias else None
        return F.linear(x, self._get(f"{name}.weight"), bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._get(f"{name}.norm.weight"), self._get(f"{name}.norm.bias")
        return F.layer_norm(x, (self.model.hidden_size,), weight, bias, self.model.norm_eps)

    @torch.no_grad()
    def logits(self, tokens: Tensor, last: int) -> Tensor:
        """Logits [b, last, vocab_size] of the last `last` positions of `tokens` [b, s] (int64)."""
        tokens = tokens.to(self.device)
        x = F.embedding(tokens, self._get("embedding.weight"))
        if self.model.positions == "learned":
            x = x + self._get("positions.weight")[: tokens.shape[1]]
        for layer in range(self.model.num_layers):
            x = x + self.attention(layer, x)
            x = x + self._mlp(layer, x)
        x = self._norm(x[:, -last:], "final")
        return F.linear(x, self._get("embedding.weight" if self.model.tied_embeddings else "head.weight"))

    @torch.no_grad()
    def attention(self, layer: int, x: Tensor) -> Tensor:
        """The attention half of a layer: norm, projections, attention, output projection. x [b, s, D] -> same."""
        model, name = self.model, f"layers.{layer}.attention"
        h = self._norm(x, name)
        q, k, v = (self._linear(h, f"{name}.{part}").unflatten(-1, (-1, model.head_dim)) for part in "qkv")
        if model.positions == "rotary":
            q, k = self._rotate(q), self._rotate(k)
        group = model.num_heads // model.num_kv_heads
        head = self._fused_head if self.dtype.itemsize == 2 else self._head
        heads = [head(q[:, :, h], k[:, :, h // group], v[:, :, h // group]) for h in range(model.num_heads)]
        return self._linear(torch.cat(heads, dim=-1), f"{name}.o")

    def _fused_head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One head by torch's own attention: what a plain 16-bit model does, whose scores are never rounded."""
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one head, in blocks of queries: q, k, v [b, s, d] -> [b, s, d]."""
        s = q.shape[1]
        rows = max(1, _SCORE_ELEMENTS // (q.shape[0] * s))
        keys = torch.arange(s, device=self.device)
        out: list[Tensor] = []
        for start in range(0, s, rows):
            queries = keys[start : start + rows]
            scores = q[:, start : start + rows] @ k.transpose(1, 2) / math.sqrt(self.model.head_dim)
            scores = scores.masked_fill(keys > queries[:, None], float("-inf"))
            out.append(torch.softmax(scores, dim=-1) @ v)
        return torch.cat(out, dim=1)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021), pairs (c, c + d/2), angle position x theta^(-2c/d). x [b, s, heads, d]."""
        half = self.model.head_dim // 2
        turns = self.model.rope_theta ** (-torch.arange(half, device=self.device).double() / half)
        angles = torch.arange(x.shape[1], device=self.device).double()[:, None, None] * turns
        cos, sin = torch.cos(angles).to(self.dtype), torch.sin(angles).to(self.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        name = f"layers.{layer}.mlp"
        approximate = "tanh" if self.model.activation == "gelu_tanh" else "none"
        return self._linear(
            F.gelu(self._linear(self._norm(x, name), f"{name}.up"), approximate=approximate), f"{name}.down"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite if anything is not finite."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if math.isfinite(difference.item()) else math.inf
