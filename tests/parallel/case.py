"""One run of a layout on real ranks, as a value, and the numbers that go into it: the same here and on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.legal import check
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a layout on real ranks. `fault` names something that is done wrong on purpose.

    `memory` and `watched` runs measure what is allocated and leave no results; a sequence that has chosen
    `stop_token` repeats it.
    """

    id: str
    model: ModelSpec
    layout: Layout
    workload: Workload
    seed: int
    fault: str = ""
    corrupted_rank: int | None = None
    memory: bool = False
    watched: bool = False
    stop_token: int | None = None

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @property
    def fp8(self) -> bool:
        """Whether the linears are FP8: then errors are compared with those of one device with such linears."""
        return self.layout.linears == "fp8"

    @property
    def steps(self) -> int:
        return self.workload.decode_steps


def make_case(name: str, layout: Layout, model: ModelSpec, workload: Workload, seed: int) -> Case:
    """A case whose id says all that it is."""
    check(model, layout, workload, layout.ranks)
    return Case(f"{name}-{layout}-{_sizes(model, workload)}-{_options(model, workload)}", model, layout, workload, seed)


def _sizes(model: ModelSpec, workload: Workload) -> str:
    sizes = f"H{model.num_heads}K{model.num_kv_heads}d{model.head_dim}L{model.num_layers}"
    return f"{sizes}b{workload.batch}s{workload.seq}+{workload.decode_steps}"


def _options(model: ModelSpec, workload: Workload) -> str:
    flags = {
        "bias": model.linear_bias,
        "tied": model.tied_embeddings,
        "bidirectional": not model.is_causal,
        f"rotary{model.rotary_dim}": model.rotary_dim,
        "scale": model.attention_scale,
        "cap": model.attn_logit_softcapping,
        f"window{model.sliding_window}": model.sliding_window,
        f"full{len(model.full_attention_layers)}": model.full_attention_layers,
        "qk-norm": model.qk_norm,
        f"{model.norm_placement}-{model.norm}": (model.norm_placement, model.norm) != ("pre", "layer"),
        "gated": model.gated_mlp,
        f"chunks{workload.chunk_positions}": workload.chunk_positions,
        "ragged": workload.prompt_lengths,
        f"calls{workload.chunk_tokens}": workload.chunk_tokens < 16_384,
    }
    return "-".join([model.positions, *(name for name, is_set in flags.items() if is_set), workload.dtype])


def prompts(case: Case) -> Tensor:
    """Token ids [batch, seq], the same on every rank and in the tests."""
    shape = (case.workload.batch, case.workload.seq)
    return torch.randint(0, case.model.vocab_size, shape, generator=torch.Generator().manual_seed(case.seed))


def upstream(case: Case) -> Tensor:
    """Random hidden states [batch, seq + 1, D] in fp64, as if they came from the layers before.

    The last position of each sequence is that of its first decoded token, wherever its prompt ends.
    """
    shape = (case.workload.batch, case.workload.seq + 1, case.model.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64)
