"""Prefill with gathered weights: the slices of a layer's weights travel, the activations stay.

The m slices of a head group divide the sequences among themselves. Each gathers the next layer's slices while this
layer computes, puts them together to the whole weights of the head group, and runs the layer on its own sequences as
plain tensor parallelism over the n head groups would (for n = 1 this is what FSDP and ZeRO-3 do). It leaves the KV
cache as the exchange `batch` keeps it, so decode goes on with the stored slices and nothing is converted.

All of a micro-batch's sequences pass a layer before the next layer is gathered: its traffic, (m - 1)/m of the group's
weights, is paid once for all of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from headgrid.layout.batching import Call, MicroBatch, pieces
from headgrid.layout.layout import Layout
from headgrid.layout.shards import head_shards
from headgrid.layout.span import Span
from headgrid.layout.traffic import over_heads
from headgrid.runtime.collectives import Receipt
from headgrid.runtime.exchange import Slices
from headgrid.runtime.hidden import Hidden
from headgrid.runtime.layer import Layer
from headgrid.runtime.mesh import Mesh
from headgrid.runtime.quantised import Quantised, as_received, matrix_as_sent
from headgrid.runtime.stage import Stage, StageCall, prefill_call
from headgrid.runtime.turns import Job, Turns
from headgrid.spec.workload import Workload


class GatheredPrefill:
    """Runs the prefill of a stage whose layout says `gathered`, on the weights and the cache of `stage`."""

    def __init__(self, layout: Layout, mesh: Mesh, stage: Stage, workload: Workload) -> None:
        """`stage` owns the slices; it does the decoding."""
        self.stage, self.workload, self.slice, model = stage, workload, mesh.tp_slice, stage.model
        self.over_heads = Stage(
            model, over_heads(layout), mesh.stage_over_heads, stage.weights, stage.cache, stage.owned, stage.positions
        )
        self.stages = (stage, self.over_heads)
        self.turns = Turns((), layout.calls_at_once)
        self._turns_in_layer = Turns((self.over_heads.mesh.tp,), layout.pieces_at_once)
        m, first = layout.num_dim_slices, mesh.at.head_group * layout.num_dim_slices
        owners = head_shards(model, layout)[first : first + m]
        # gathered channels stay in slice order, as the exchange `batch` caches them
        self.over_heads.rotations = stage.tables([owner.qk_channels for owner in owners])
        vocab = stage.vocab[first : first + m]
        self.vocab, self.vocab_sizes = Span(vocab[0].start, vocab[-1].stop), [len(span) for span in vocab]

    def pieces(self, micro_batch: MicroBatch) -> list[StageCall]:
        """This slice's own sequences of a micro-batch, in the pieces in which a layer computes them."""
        mine, stage = micro_batch.parts[self.slice.index], self.stage
        several = pieces(stage.layout, len(mine), self.workload)
        calls = [Call(MicroBatch((rows.shift(mine.start),)), span) for rows, span in several]
        return [prefill_call(stage.model, self.workload, call, stage.device) for call in calls]

    def hidden_tokens(self, call: Call) -> int:
        """Tokens of a call whose hidden states this rank holds: of its slice's sequences."""
        sizes = pieces(self.stage.layout, len(call.micro_batch.parts[self.slice.index]), self.workload)
        return sum(len(self.over_heads.residual.own(len(rows) * len(positions))) for rows, positions in sizes)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """A call's micro-batch through this stage: every slice computes the sequences of its own part, b_j of b.

        `x`: token ids [b, s] of all parts on the first stage, else hidden states of this rank's tokens, piece by piece,
        overwritten. Returns such hidden states, or on the last stage the logits of all parts' last tokens [b, vocab]
        (of every token: [b s, vocab]).
        """
        micro_batch = call.micro_batch
        mine, calls = micro_batch.parts[self.slice.index], self.pieces(micro_batch)
        pending = self._start(self.stage.layers[0])
        if self.stage.first:
            x = self._embed(x.split([len(part) for part in micro_batch.parts])[self.slice.index], mine, calls)
        parts = list(x.split([len(self.over_heads.residual.own(piece.tokens)) for piece in calls]))
        for index in range(len(self.stage.layers)):
            layer = self._assemble(self.stage.layers[index], pending)
            if index + 1 < len(self.stage.layers):
                pending = self._start(self.stage.layers[index + 1])
            self._apply(layer, index, parts, calls)
            del layer
        if self.stage.last:
            return self._logits(parts, calls, micro_batch)
        return torch.cat(parts) if torch.is_grad_enabled() else x

    def _apply(self, layer: Layer, index: int, parts: list[Tensor], calls: list[StageCall]) -> None:
        """A layer on the hidden states of all pieces, which are replaced."""

        def compute(k: int) -> Tensor:
            hidden = Hidden(parts[k])
            self.over_heads.apply(layer, index, hidden, calls[k])
            return self.over_heads.settled(hidden)

        jobs = (
            Job(call.micro_batch, partial(compute, k), partial(parts.__setitem__, k)) for k, call in enumerate(calls)
        )
        self._turns_in_layer.run(jobs)

    def _embed(self, tokens: Tensor, mine: Span, calls: list[StageCall]) -> Tensor:
        """This slice's sequences [b_j, s] -> hidden states; the group's part of the vocabulary is gathered for it."""
        table = self.stage.weights["embedding.weight"]
        sizes = [size * table.shape[1] for size in self.vocab_sizes]
        table = self.slice.all_gather(table.view(-1), sizes).view(-1, table.shape[1])
        parts = []
        for call in calls:
            rows, start = call.micro_batch.parts[0].within(mine), call.queries.starts[0]
            ids = tokens[rows.start : rows.stop, start : start + call.queries.count]
            parts.append(self.over_heads.embed(ids, table, self.vocab, call.queries))
        return torch.cat(parts) if parts else self._nothing(table)

    def _nothing(self, table: Tensor) -> Tensor:
        """Hidden states of no tokens, with a gradient (none) for the gathered table."""
        return table[:0].clone().to(self.stage.residual_dtype)  # a view would keep the whole table

    def _logits(self, parts: list[Tensor], calls: list[StageCall], micro_batch: MicroBatch) -> Tensor:
        """All slices' ending tokens are gathered, then the stored slices of the head give the logits."""
        mine = micro_batch.parts[self.slice.index]
        last: list[Tensor] = []
        rows: list[int] = []
        for part, call in zip(parts, calls, strict=True):
            if call.ending:
                last.append(self.over_heads.final_norm(part, call))
                first = call.micro_batch.parts[0].within(mine).start
                rows += [first + place // call.queries.count for place in call.ending]
        width, device = self.stage.model.hidden_size, self.stage.device
        own = torch.cat(last) if last else torch.empty(0, width, dtype=self.stage.dtype, device=device)
        if rows != sorted(rows):  # pieces of a prompt come one after the other, so short prompts end first
            own = own[torch.tensor(rows, device=device).argsort(stable=True)]
        sizes = [len(part) * self.workload.outputs * width for part in micro_batch.parts]
        return self.stage.head(self.slice.all_gather(own.reshape(-1), sizes, alike=True).view(-1, width))

    def _start(self, layer: Layer) -> dict[str, Receipt]:
        """Begin to gather the slices of the four matrices, and of biases and head norms, which are cut like them."""
        matrices = {"qkv": layer.qkv[0], "o": layer.o[0], "up": layer.up[0], "down": layer.down[0]}
        parts = {name: matrix_as_sent(weight) for name, weight in matrices.items()}
        parts |= {  # those of `o` and `down` are of whole rows, which all slices have
            f"{name} scale": weight.scales
            for name, weight in matrices.items()
            if isinstance(weight, Quantised) and name in ("qkv", "up")
        }
        parts |= {
            f"{name} bias": bias for name, bias in (("qkv", layer.qkv[1]), ("up", layer.up[1])) if bias is not None
        }
        parts |= {f"{name} norm": norm for name, norm in (("q", layer.q_norm), ("k", layer.k_norm)) if norm is not None}
        return {
            name: self.slice.start_all_gather(part.view(-1), self._sizes(name, part)) for name, part in parts.items()
        }

    def _sizes(self, name: str, part: Tensor) -> list[int]:
        """Elements that each slice contributes: its width of `name` times what all slices have in common."""
        widths = self._widths(name.split()[0])
        return [part.numel() // widths[self.slice.index] * width for width in widths]

    def _widths(self, name: str) -> list[int]:
        """Rows of qkv, columns of o, channels of a head or units of the MLP, in each slice."""
        slices = self.stage.slices
        if name in ("q", "k"):
            return list(slices.qk_widths)
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

        def vector(name: str, whole: Callable[[str], Tensor]) -> Tensor | None:
            return whole(name).view(-1) if name in pending else None

        qkv = as_received(rows("qkv"), layer.qkv[0], vector("qkv scale", rows)), vector("qkv bias", rows)
        o = torch.cat([part.view(hidden, slices.heads, -1) for part in arrived("o")], dim=-1).flatten(1)

        def up_rows(name: str) -> Tensor:
            if not self.stage.model.gated_mlp:
                return pending.pop(name).wait()
            halves = [part.chunk(2) for part in arrived(name)]
            return torch.cat([half for both in zip(*halves, strict=True) for half in both])

        whole_up = up_rows("up").view(-1, hidden)
        up = as_received(whole_up, layer.up[0], vector("up scale", up_rows)), vector("up bias", up_rows)
        down = torch.cat([part.view(hidden, -1) for part in arrived("down")], dim=-1)
        norms = (pending.pop(f"{name} norm").wait() if layer.q_norm is not None else None for name in "qk")
        q_norm, k_norm = norms
        o, down = ((as_received(whole, weight), bias) for whole, (weight, bias) in ((o, layer.o), (down, layer.down)))
        return replace(layer, qkv=qkv, o=o, up=up, down=down, q_norm=q_norm, k_norm=k_norm)


def _heads_together(slices: Slices, blocks: list[Tensor]) -> Tensor:
    """Rows of whole heads from the rows of their slices: blocks [H w_r + K w_r + K u_r, D] -> [(H + 2 K) d, D]."""
    heads, kv = slices.heads, slices.kv_heads
    d, width = sum(slices.qk_widths), blocks[0].shape[1]
    whole = blocks[0].new_empty((heads + 2 * kv) * d, width)
    qk, v = whole[: (heads + kv) * d].view(-1, d, width), whole[(heads + kv) * d :].view(kv, d, width)
    at_qk, at_v = 0, 0
    for block, w, u in zip(blocks, slices.qk_widths, slices.v_widths, strict=True):
        of_qk, of_v = block.split([(heads + kv) * w, kv * u])
        qk[:, at_qk : at_qk + w] = of_qk.view(-1, w, width)
        v[:, at_v : at_v + u] = of_v.view(kv, u, width)
        at_qk, at_v = at_qk + w, at_v + u
    return whole
