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

    def attention(self, layer: int, x: Tensor) -> Tensor:
        """The attention half of a layer: norm, projections, attention, output projection. x [b, s, D] -> same."""
        model, name = self.model, f"layers.{layer}.attention"
        h = self._norm(x, name)
        q, k, v = (self._linear(h, f"{name}.{part}").unflatten(-1, (-1, model.head_dim)) for part in "qkv")
        if model.qk_norm:
            q, k = self._rms_norm(q, f"{name}.q_norm"), self._rms_norm(k, f"{name}.k_norm")
        if model.positions == "rotary":
            q, k = self._rotate(q), self._rotate(k)
        group, window = model.num_heads // model.num_kv_heads, model.window(layer)
        head = self._fused_head if self.dtype.itemsize == 2 else self._head
        heads = [head(q[:, :, h], k[:, :, h // group], v[:, :, h // group], window) for h in range(model.num_heads)]
        return self._linear(torch.cat(heads, dim=-1), f"{name}.o")

    def _fused_head(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """One head by torch's own attention: what a plain 16-bit model does, whose scores are never rounded."""
        if self.model.attn_logit_softcapping:  # torch's has no cap; fused kernels that do keep scores in fp32
            return self._head(q.float(), k.float(), v.float(), window).to(self.dtype)
        positions = torch.arange(q.shape[1], device=self.device)
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        special = not self.model.is_causal or window > 0
        mask = ~self._hidden(positions, positions, window) if special else None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not special, scale=self._scale).squeeze(1)

    def _hidden(self, queries: Tensor, keys: Tensor, window: int) -> Tensor:
        """Which keys a query must not see, by their positions: [queries, keys]."""
        if not self.model.is_causal:
            return torch.zeros(len(queries), len(keys), dtype=torch.bool, device=self.device)
        hidden = keys > queries[:, None]
        return hidden | (keys <= queries[:, None] - window) if window else hidden

    @property
    def _scale(self) -> float:
        scale = self.model.attention_scale
        return 1 / math.sqrt(self.model.head_dim) if scale is None else scale

    def _head(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attention of one head, in blocks of queries: q, k, v [b, s, d] -> [b, s, d]."""
        s, cap = q.shape[1], self.model.attn_logit_softcapping
        rows = max(1, _SCORE_ELEMENTS // (q.shape[0] * s))
        keys = torch.arange(s, device=self.device)
        out: list[Tensor] = []
        for start in range(0, s, rows):
            queries = keys[start : start + rows]
            scores = q[:, start : start + rows] @ k.transpose(1, 2) * self._scale
            if cap:
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(self._hidden(queries, keys, window), float("-inf"))
            out.append(torch.softmax(scores, dim=-1) @ v)
        return torch.cat(out, dim=1)

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        """Each head divided by its root mean square (Zhang, Sennrich 2019), times a weight [d]. x [b, s, heads, d]."""
        squares = x.float() if self.dtype.itemsize == 2 else x
        size = torch.rsqrt(squares.pow(2).mean(-1, keepdim=True) + self.model.norm_eps)
        return (squares * size).to(self.dtype) * self._get(f"{name}.weight")

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021), pairs (c, c + r/2) of the r channels that turn,
        angle position x theta^(-2c/r). x [b, s, heads, d].
        """
        turned = self.model.rotary_dim or self.model.head_dim
        half = turned // 2
        turns = self.model.rope_theta ** (-torch.arange(half, device=self.device).double() / half)
        angles = torch.arange(x.shape[1], device=self.device).double()[:, None, None] * turns
        cos, sin = torch.cos(angles).to(self.dtype), torch.sin(angles).to(self.dtype)
        a, b, rest = x.split([half, half, self.model.head_dim - turned], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

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
