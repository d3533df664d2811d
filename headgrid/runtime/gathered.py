"""Prefill with gathered weights: the slices of a layer's weights travel, the activations stay.

The m slices of a head group divide the sequences among themselves. Each gathers the next layer's slices while this
layer computes, puts them together to the whole weights of the head group, and runs the layer on its own sequences as
plain tensor parallelism over the n head groups would (for n = 1 this is what FSDP and ZeRO-3 do). It leaves the KV
cache as the exchange `batch` keeps it, so decode goes on with the stored slices and nothing is converted.

All of a micro-batch's sequences pass a layer before the next layer is gathered: its traffic, (m - 1)/m of the group's
weights, is paid once for all of them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from headgrid.layout.batching import MicroBatch, chunks
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shards
from headgrid.layout.span import Span
from headgrid.runtime.collectives import Receipt
from headgrid.runtime.exchange import Slices
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.stage import Layer, Stage
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload


class GatheredPrefill:
    """Runs the prefill of a stage whose layout says `gathered`, on the weights and the cache of `stage`."""

    def __init__(self, model: ModelSpec, layout: Layout, mesh: Mesh, stage: Stage, workload: Workload) -> None:
        """`stage` owns the slices; it does the decoding."""
        self.stage, self.workload, self.slice = stage, workload, mesh.tp_slice
        whole = replace(layout, num_dim_slices=1, exchange="none", weights="stationary")
        self.over_heads = Stage(model, whole, mesh.stage_over_heads, stage.weights, stage.cache, stage.owned)
        m, first = layout.num_dim_slices, mesh.at.head_group * layout.num_dim_slices
        owners = head_shards(model, layout)[first : first + m]
        if model.positions == "rotary":  # gathered channels stay in slice order, as the exchange `batch` caches them
            self.over_heads.rotations = [stage.rotation(owner.qk_channels) for owner in owners]
        vocab = stage.vocab[first : first + m]
        self.vocab, self.vocab_sizes = Span(vocab[0].start, vocab[-1].stop), [len(span) for span in vocab]

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """A micro-batch through this stage: every slice computes the sequences of its own part, b_j of b.

        `x`: token ids [b, s] of all parts on the first stage, else hidden states [b_j, s, D], overwritten. Returns
        hidden states [b_j, s, D], or on the last stage the logits of all parts' last positions [b, vocab_size].
        """
        mine = micro_batch.parts[self.slice.index]
        pending = self._start(self.stage.layers[0])
        if self.stage.first:
            x = self._embed(x.split([len(part) for part in micro_batch.parts])[self.slice.index])
        pieces = chunks(len(mine), self.workload)
        for index in range(len(self.stage.layers)):
            layer = self._assemble(self.stage.layers[index], pending)
            if index + 1 < len(self.stage.layers):
                pending = self._start(self.stage.layers[index + 1])
            for piece in pieces:
                part = MicroBatch((piece.shift(mine.start),))
                self.over_heads.apply(layer, index, x[piece.start : piece.stop], part, None)
            del layer
        return self._logits(x, micro_batch) if self.stage.last else x

    def _embed(self, tokens: Tensor) -> Tensor:
        """This slice's sequences [b_j, s] -> [b_j, s, D]; the group's part of the vocabulary is gathered for it."""
        table = self.stage.weights["embedding.weight"]
        sizes = [size * table.shape[1] for size in self.vocab_sizes]
        table = self.slice.all_gather(table.view(-1), sizes).view(-1, table.shape[1])
        if not len(tokens):
            return table.new_empty(*tokens.shape, table.shape[1])
        return self.over_heads.embed(tokens, table, self.vocab, None)

    def _logits(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """All slices' last positions are gathered (few), then the stored slices of the head give the logits."""
        last = self.stage.final_norm(x)
        width = last.shape[1]
        return self.stage.head(
            self.slice.all_gather(last.reshape(-1), [len(part) * width for part in micro_batch.parts]).view(-1, width)
        )

    def _start(self, layer: Layer) -> dict[str, Receipt]:
        """Begin to gather the slices of the four matrices, and of the biases that are cut like them."""
        parts = {"qkv": layer.qkv[0], "o": layer.o[0], "up": layer.up[0], "down": layer.down[0]}
        parts |= {
            f"{name} bias": bias for name, bias in (("qkv", layer.qkv[1]), ("up", layer.up[1])) if bias is not None
        }
        return {
            name: self.slice.start_all_gather(part.view(-1), self._sizes(name, part)) for name, part in parts.items()
        }

    def _sizes(self, name: str, part: Tensor) -> list[int]:
        """Elements that each slice contributes: its width of `name` times what all slices have in common."""
        widths = self._widths(name.split()[0])
        return [part.numel() // widths[self.slice.index] * width for width in widths]

    def _widths(self, name: str) -> list[int]:
        """Rows of qkv, columns of o, or units of the MLP, in each slice."""
        slices = self.stage.slices
        if name == "qkv":
            return slices.row_widths
        return [slices.heads * u for u in slices.v_widths] if name == "o" else self.stage.units

    def _assemble(self, layer: Layer, pending: dict[str, Receipt]) -> Layer:
        """The whole weights of the head group from the gathered slices, one matrix after the other."""
        slices, hidden = self.stage.slices, self.stage.model.hidden_size

        def arrived(name: str) -> list[Tensor]:
            receipt = pending.pop(name)
            widths = self._widths(name.split()[0])
            whole = receipt.wait()
            return list(whole.split([len(whole) // sum(widths) * width for width in widths]))

        def rows(name: str) -> Tensor:
            return _heads_together(
                slices, [part.view(width, -1) for part, width in zip(arrived(name), slices.row_widths, strict=True)]
            )

        qkv = rows("qkv"), rows("qkv bias").view(-1) if layer.qkv[1] is not None else None
        o = torch.cat([part.view(hidden, slices.heads, -1) for part in arrived("o")], dim=-1).flatten(1)
        up = pending.pop("up").wait().view(-1, hidden)
        up_bias = pending.pop("up bias").wait() if layer.up[1] is not None else None
        down = torch.cat([part.view(hidden, -1) for part in arrived("down")], dim=-1)
        return Layer(layer.attention_norm, qkv, (o, layer.o[1]), layer.mlp_norm, (up, up_bias), (down, layer.down[1]))


def _heads_together(slices: Slices, blocks: list[Tensor]) -> Tensor:
    """Rows of whole heads from the rows of their slices: blocks [H w_r + K w_r + K u_r, D] -> [(H + 2 K) d, D]."""
    heads, kv = slices.heads, slices.kv_heads
    d, width = sum(slices.qk_widths), blocks[0].shape[1]
    whole = blocks[0].new_empty((heads + 2 * kv) * d, width)
    qk, v = whole.split([(heads + kv) * d, kv * d])
    qk, v = qk.view(heads + kv, d, width), v.view(kv, d, width)
    for block, qk_part, v_part in zip(
        blocks, qk.split(list(slices.qk_widths), dim=1), v.split(list(slices.v_widths), dim=1), strict=True
    ):
        of_qk, of_v = block.split([qk_part.shape[0] * qk_part.shape[1], v_part.shape[0] * v_part.shape[1]])
        qk_part.copy_(of_qk.view_as(qk_part))
        v_part.copy_(of_v.view_as(v_part))
    return whole
