"""Cases of training: every layout that is legal to 8 ranks, each with one of several kinds of model."""

import itertools
from dataclasses import dataclass, replace

from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, legal_layouts
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MODEL = ModelSpec(
    name="trained",
    num_layers=3,
    hidden_size=22,
    num_heads=8,
    num_kv_heads=4,
    head_dim=18,
    mlp_hidden_size=37,
    vocab_size=29,
    max_positions=12,
    attention_gain=3.0,
)
VARIANTS = {
    "rotary": {},
    "learned, biases, tied": {"positions": "learned", "linear_bias": ("qkv", "o", "mlp"), "tied_embeddings": True},
    "head norms, partly rotary": {"qk_norm": True, "rotary_dim": 8, "linear_bias": ("qkv", "o", "mlp")},
    "window, cap, scale": {"sliding_window": 4, "attn_logit_softcapping": 3.0, "attention_scale": 0.4},
    "bidirectional, tied": {"is_causal": False, "tied_embeddings": True, "activation": "gelu_tanh"},
}
WORKLOAD = Workload(batch=9, seq=7, decode_steps=0, dtype="float64", chunk_tokens=28)
AT_ONCE = Workload(batch=9, seq=7, decode_steps=0, dtype="float64")
"""`WORKLOAD` goes through the layers in three calls, whose gradients add up; this in one. Cases take turns."""
WORLD_SIZES = range(1, 9)
FAULTS = ("gradients of parts not summed", "gradients of copies not summed")
FAULTY = ("tp4", "n2m2:batch+sharded", "n2m2:batch+gathered", "tp4:dp-attention")
DP_ATTENTION = ("tp2:dp-attention", "tp3:dp-attention+fp32", "tp4:dp-attention", "tp2pp2:dp-attention")
DP_ATTENTION += ("tp2dp2:dp-attention",)
COPIED_KV = replace(MODEL, name="two KV heads", num_kv_heads=2)


@dataclass(frozen=True, slots=True)
class TrainingCase:
    """One forward and backward pass on real ranks. `fault` names something that is done wrong on purpose."""

    id: str
    model: ModelSpec
    layout: Layout
    workload: Workload = WORKLOAD
    fault: str = ""

    @property
    def ranks(self) -> int:
        return self.layout.ranks


def _layouts(ranks: int) -> list[Layout]:
    """Every other one keeps its hidden states in fp32 or wider."""
    found = legal_layouts(MODEL, ranks)
    return [replace(layout, residual_dtype="fp32") if k % 2 else layout for k, layout in enumerate(found)]


def all_cases() -> list[TrainingCase]:
    """One for each legal layout, the kinds of model in turn, then tensor parallelism that copies KV heads and attention
    that is data parallel, of each kind of model.
    """
    kinds = itertools.cycle(VARIANTS)
    cases = [_case(layout, kind, MODEL) for r in WORLD_SIZES for layout, kind in zip(_layouts(r), kinds, strict=False)]
    copied = [Layout(num_head_groups=n, residual=r) for n in (4, 8) for r in ("replicated", "sharded")]
    cases += [_case(layout, kind, COPIED_KV) for layout, kind in zip(copied, kinds, strict=False)]
    cases += [_case(parse_layout(text), kind, MODEL) for text, kind in zip(DP_ATTENTION, VARIANTS, strict=True)]
    return [replace(case, workload=AT_ONCE) if k % 4 < 2 else case for k, case in enumerate(cases)]


def _case(layout: Layout, kind: str, model: ModelSpec) -> TrainingCase:
    check(model, layout, WORKLOAD)
    return TrainingCase(f"{layout}-{kind}-K{model.num_kv_heads}", replace(model, **VARIANTS[kind]), layout)


def sampled(cases: list[TrainingCase]) -> list[TrainingCase]:
    """What `make test` runs: all to 4 ranks but every sixth of the larger ones."""
    return [case for k, case in enumerate(cases) if case.ranks <= 4 or k % 6 == 0]
