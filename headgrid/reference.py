"""The plain single-device transformer: the oracle that every layout must agree with.

It shares no code with `runtime` and is itself checked against transformers. It is written to be obviously right,
not fast: whole matrices, one layer at a time, explicit softmax, any dtype. In float64 it is the truth; in the dtype
of a run, and with FP8 linears where the run has these, it is the noise floor that a layout's error is compared with.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from headgrid.spec.model import Biased, ModelSpec
from headgrid.spec.rope import Rope

GetWeight = Callable[[str], Tensor]
"""The whole tensor of a global name, in any dtype and on any device; called once for each tensor."""

_SCORE_ELEMENTS = 1 << 26  # scores held at a time: 512 MiB in float64


class Reference:
    """A model on one device, its weights fetched layer by layer, so that only one layer is held at a time."""

    def __init__(
        self,
        model: ModelSpec,
        get: GetWeight,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        fp8_linears: bool = False,
    ) -> None:
        """`get(name)` returns whole weights; they are converted to `dtype` on `device`.

        With `fp8_linears` the projections of attention and the MLP's matrices get both factors rounded to e4m3.
        """
        self.model, self.dtype, self.device, self.fp8_linears = model, dtype, torch.device(device), fp8_linears
        self._fetch = get

    def _get(self, name: str) -> Tensor:
        return self._fetch(name).to(self.device, self.dtype)

    def _linear(self, x: Tensor, name: str, part: Biased) -> Tensor:
        bias = self._get(f"{name}.bias") if part in self.model.linear_bias else None
        weight = self._get(f"{name}.weight")
        if self.fp8_linears:
            product = F.linear(_through_fp8(x), _through_fp8(weight)).to(self.dtype)
            return product if bias is None else product + bias
        return F.linear(x, weight, bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Over the last dim; by root mean squares in fp32 or wider, times weight or 1 + weight."""
        weight, model = self._get(f"{name}.weight"), self.model
        if model.norm == "layer":
            return F.layer_norm(x, (model.hidden_size,), weight, self._get(f"{name}.bias"), model.norm_eps)
        return self._rms_norm(x, weight)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., w] divided by its root mean square (Zhang, Sennrich 2019), times a weight [w]."""
        wide = x.float() if self.dtype.itemsize == 2 else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.model.norm_eps)
        if self.model.norm_unit_offset:  # Gemma rounds once, behind the weight
            return (normed * (1 + weight.to(wide.dtype))).to(self.dtype)
        return normed.to(self.dtype) * weight

    def logits(self, tokens: Tensor, last: int) -> Tensor:
        """Logits [b, last, vocab_size] of the last `last` positions of `tokens` [b, s] (int64).

        Of a model without a head, hidden states [b, last, D].
        """
        *_, x = self.hidden_states(tokens)
        return self.head(x[:, -last:])

    def hidden_states(self, tokens: Tensor) -> Iterator[Tensor]:
        """The embeddings of `tokens` [b, s] (int64), and what each layer makes of them: 1 + num_layers x [b, s, D]."""
        x = self._embed(tokens.to(self.device))
        yield x
        for layer in range(self.model.num_layers):
            x = self._added(x, self.attention(layer, x), f"layers.{layer}.attention")
            x = self._added(x, self._mlp(layer, x), f"layers.{layer}.mlp")
            yield x

    def _embed(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = F.embedding(tokens, self._get("embedding.weight"))
        x = x * torch.tensor(model.embedding_scale, dtype=self.dtype)
        if model.positions == "learned":
            x = x + self._get("positions.weight")[: tokens.shape[1]]
        if model.token_types:
            x = x + self._get("token_types.weight")[0]
        return self._norm(x, "embedding.norm") if model.embedding_norm else x

    def _added(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        return self._norm(x + y, f"{name}.norm") if self.model.norm_placement == "post" else x + y

    def _half(self, x: Tensor, name: str, part: Callable[[Tensor], Tensor]) -> Tensor:
        """What one half of a layer adds to x, with its norms before and behind `part`, where it has them."""
        y = part(x if self.model.norm_placement == "post" else self._norm(x, f"{name}.norm"))
        return self._norm(y, f"{name}.post_norm") if self.model.norm_placement == "both" else y

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocab_size] of the last layer's hidden states x [..., D]; without a head the states."""
        x = self._norm(x, "final.norm") if self.model.has_final_norm else x
        if self.model.head == "none":
            return x
        logits = F.linear(x, self._get("embedding.weight" if self.model.tied_embeddings else "head.weight"))
        cap = self.model.final_logit_softcapping
        return cap * torch.tanh(logits / cap) if cap else logits

    def attention(self, layer: int, x: Tensor) -> Tensor:
        """The attention half of a layer: norms, projections, attention, output projection. x [b, s, D] -> same."""
        return self._half(x, f"layers.{layer}.attention", partial(self._attend, layer))

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        model, name = self.model, f"layers.{layer}.attention"
        q, k, v = (self._linear(x, f"{name}.{part}", "qkv").unflatten(-1, (-1, model.head_dim)) for part in "qkv")
        if model.qk_norm:
            q, k = (self._rms_norm(y, self._get(f"{name}.{part}_norm.weight")) for y, part in ((q, "q"), (k, "k")))
        if model.positions == "rotary":
            q, k = self._rotate(q, model.rope(layer)), self._rotate(k, model.rope(layer))
        group, window = model.num_heads // model.num_kv_heads, model.window(layer)
        head = self._fused_head if self.dtype.itemsize == 2 else self._head
        heads = [head(q[:, :, h], k[:, :, h // group], v[:, :, h // group], window) for h in range(model.num_heads)]
        return self._linear(torch.cat(heads, dim=-1), f"{name}.o", "o")

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

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Rotary positions (Su et al. 2021), pairs (c, c + r/2) of the r channels that turn. x [b, s, heads, d]."""
        half = rope.dim // 2
        turns = torch.tensor(rope.frequencies(), dtype=torch.float64, device=self.device)
        angles = torch.arange(x.shape[1], device=self.device).double()[:, None, None] * turns
        cos, sin = ((f(angles) * rope.amplitude).to(self.dtype) for f in (torch.cos, torch.sin))
        a, b, rest = x.split([half, half, self.model.head_dim - rope.dim], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        return self._half(x, f"layers.{layer}.mlp", partial(self._units, f"layers.{layer}.mlp"))

    def _units(self, name: str, x: Tensor) -> Tensor:
        up = self._linear(x, f"{name}.up", "mlp")
        if self.model.gated_mlp:
            return self._linear(self._activate(self._linear(x, f"{name}.gate", "mlp")) * up, f"{name}.down", "mlp")
        return self._linear(self._activate(up), f"{name}.down", "mlp")

    def _activate(self, x: Tensor) -> Tensor:
        if self.model.activation in ("silu", "relu"):
            return F.silu(x) if self.model.activation == "silu" else F.relu(x)
        return F.gelu(x, approximate="tanh" if self.model.activation == "gelu_tanh" else "none")


def _through_fp8(x: Tensor) -> Tensor:
    """x [..., K], each of its rows scaled to e4m3's largest number, rounded to e4m3 and scaled back, in fp32 or wider;
    a row of zeros is left alone.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / torch.finfo(torch.float8_e4m3fn).max)
    return (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(wide.dtype) * scale


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite if anything is not finite."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item() if math.isfinite(difference.item()) else math.inf
