"""What the suite covers. An empty or lopsided suite is a failure, not a success."""

from pathlib import Path

import pytest
from case import Case
from cases import WORLD_SIZES, default_cases

from headgrid.layout.shards import qk_channels
from headgrid.layout.span import balanced, total

LEAST = 220


def test_the_suite_has_its_cases() -> None:
    cases = default_cases()
    assert len(cases) == len({case.id for case in cases}) >= LEAST
    assert {case.ranks for case in cases} == set(WORLD_SIZES)


def test_they_were_collected(request: pytest.FixtureRequest) -> None:
    """A parametrisation that yields nothing, or a module that is not found, would be passed over without a word."""
    module, config = Path(__file__).with_name("test_exactness.py"), request.config
    asked_for = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    if config.option.keyword or not any(module.is_relative_to(path) for path in asked_for):
        pytest.skip("only a part of the suite was asked for")
    assert len([item for item in request.session.items if item.path == module]) >= LEAST


def test_both_cuts_are_real_in_most_cases() -> None:
    both = [case for case in default_cases() if min(case.layout.num_head_groups, case.layout.num_dim_slices) > 1]
    assert len(both) > 0.55 * len(default_cases())


PROPERTIES = {
    "exchange gather": lambda c: c.layout.exchange == "gather",
    "exchange batch": lambda c: c.layout.exchange == "batch",
    "exchange sequence": lambda c: c.layout.exchange == "sequence",
    "exchange scores": lambda c: c.layout.exchange == "scores",
    "sharded residual": lambda c: c.layout.residual == "sharded",
    "sharded residual of no tokens somewhere": lambda c: (
        c.layout.residual == "sharded" and c.steps > 0 and c.workload.batch < c.layout.tp * c.layout.dp
    ),
    "sharded residual in a pipeline": lambda c: c.layout.residual == "sharded" and c.layout.pp > 1,
    "fp32 residual": lambda c: c.layout.residual_dtype == "fp32",
    "fp32 residual of 16-bit models": lambda c: c.layout.residual_dtype == "fp32" and _narrow(c),
    "fp16": lambda c: c.workload.dtype == "float16",
    "bf16": lambda c: c.workload.dtype == "bfloat16",
    "16 bits on at most 4 ranks": lambda c: _narrow(c) and c.ranks <= 4,
    "16 bits on more ranks": lambda c: _narrow(c) and c.ranks > 4,
    "ragged": lambda c: _ragged(c),
    "ragged in a pipeline": lambda c: _ragged(c) and c.layout.pp > 1,
    "chunks": lambda c: c.workload.chunk_positions > 0,
    "ragged chunks": lambda c: _ragged(c) and c.workload.chunk_positions > 0,
    "ragged chunks of gathered weights": lambda c: (
        c.layout.weights == "gathered" and c.workload.chunk_positions + _ragged(c) > 1
    ),
    "early end": lambda c: c.stop_token is not None,
    "early end in a pipeline or replicas": lambda c: c.stop_token is not None and c.layout.pp * c.layout.dp > 1,
    "bidirectional": lambda c: not c.model.is_causal,
    "bidirectional and ragged": lambda c: not c.model.is_causal and _ragged(c),
    "partial rotation": lambda c: 0 < c.model.rotary_dim < c.model.head_dim,
    "odd head dim": lambda c: c.model.head_dim % 2 > 0,
    "scale": lambda c: c.model.attention_scale is not None,
    "soft cap": lambda c: c.model.attn_logit_softcapping > 0,
    "window": lambda c: c.model.sliding_window > 0,
    "window in some layers": lambda c: c.model.full_attention_layers != (),
    "QK norm": lambda c: c.model.qk_norm,
    "QK norm over slices": lambda c: c.model.qk_norm and c.layout.num_dim_slices > 1,
    "output concat": lambda c: c.layout.output == "concat",
    "gathered weights": lambda c: c.layout.weights == "gathered",
    "gathered weights in a pipeline": lambda c: c.layout.weights == "gathered" and c.layout.pp > 1,
    "gathered weights, uneven slices": lambda c: (
        c.layout.weights == "gathered" and c.model.head_dim % c.layout.num_dim_slices > 0
    ),
    "data-parallel attention": lambda c: c.layout.attention == "dp-attention",
    "data-parallel attention, uneven batch": lambda c: (
        c.layout.attention == "dp-attention" and c.workload.batch % (c.layout.tp * c.layout.dp) > 0
    ),
    "data-parallel attention, heads that ranks do not divide": lambda c: (
        c.layout.attention == "dp-attention" and c.model.num_kv_heads % c.layout.tp > 0
    ),
    "tensor parallel": lambda c: c.layout.num_head_groups > 1 == c.layout.num_dim_slices,
    "KV heads copied": lambda c: c.layout.num_head_groups > c.model.num_kv_heads,
    "pipeline": lambda c: c.layout.pp > 1,
    "replicas": lambda c: c.layout.dp > 1,
    "one KV head for each query head": lambda c: c.model.num_heads == c.model.num_kv_heads > 1,
    "grouped KV heads": lambda c: c.model.num_heads > c.model.num_kv_heads > 1,
    "one KV head": lambda c: c.model.num_heads > c.model.num_kv_heads == 1,
    "rotary": lambda c: c.model.positions == "rotary",
    "learned": lambda c: c.model.positions == "learned",
    "biases": lambda c: c.model.linear_bias,
    "biases on Q, K and V only": lambda c: c.model.linear_bias == ("qkv",),
    "RMS norms": lambda c: c.model.norm == "rms",
    "weights of norms that count from 1": lambda c: c.model.norm_unit_offset,
    "norms on both sides": lambda c: c.model.norm_placement == "both",
    "norms behind sums": lambda c: c.model.norm_placement == "post",
    "gated MLPs": lambda c: c.model.gated_mlp,
    "rotary positions of two kinds": lambda c: c.model.local_rope_theta and c.model.full_attention_layers,
    "no biases": lambda c: not c.model.linear_bias,
    "tied": lambda c: c.model.tied_embeddings,
    "tied across stages": lambda c: c.model.tied_embeddings and c.layout.pp > 1,
    "fp32": lambda c: c.workload.dtype == "float32",
    "uneven slices of Q and K": lambda c: _uneven(total(s) for s in qk_channels(c.model, c.layout.num_dim_slices)),
    "uneven slices of V": lambda c: c.model.head_dim % c.layout.num_dim_slices > 0,
    "uneven MLP": lambda c: c.model.mlp_hidden_size % c.layout.tp > 0,
    "uneven vocabulary": lambda c: c.model.vocab_size % c.layout.tp > 0,
    "uneven output columns": lambda c: c.layout.output == "concat" and c.model.hidden_size % c.layout.tp > 0,
    "uneven stages": lambda c: _uneven(len(s) for s in balanced(c.model.num_layers, c.layout.pp)),
    "fewer sequences than slices": lambda c: _shares_batch(c) and c.workload.batch < c.layout.num_dim_slices,
    "uneven batch over slices": lambda c: _shares_batch(c) and c.workload.batch % c.layout.num_dim_slices > 0,
    "uneven batch over replicas": lambda c: c.workload.batch % c.layout.dp > 0,
    "fewer sequences than stages": lambda c: c.workload.batch < c.layout.pp,
    "several calls": lambda c: c.workload.chunk_tokens < c.workload.seq * c.workload.batch,
}


def _uneven(sizes: object) -> bool:
    return len(set(sizes)) > 1  # type: ignore[call-overload]


def _narrow(case: Case) -> bool:
    return case.workload.element_bytes == 2


def _ragged(case: Case) -> bool:
    return len(set(case.workload.lengths)) > 1


def _shares_batch(case: Case) -> bool:
    return case.layout.exchange == "batch"


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_that_could_break_a_layout_is_covered(name: str) -> None:
    having = [case.id for case in default_cases() if PROPERTIES[name](case)]
    assert len(having) >= 3, having


@pytest.mark.parametrize("name", ["ragged", "chunks", "window", "QK norm", "bidirectional", "soft cap"])
def test_every_exchange_meets_every_variant(name: str) -> None:
    met = {case.layout.exchange for case in default_cases() if PROPERTIES[name](case)}
    assert met >= {"gather", "batch", "sequence", "scores"}


def test_every_pair_of_exchange_and_output_meets_every_kind_of_model() -> None:
    def kind(case: Case) -> tuple:
        model = case.model
        grouped = model.num_heads > model.num_kv_heads
        return case.layout.exchange, case.layout.output, model.positions, grouped, bool(model.linear_bias)

    kinds = {kind(case) for case in default_cases() if case.layout.num_dim_slices > 1}
    assert len(kinds) == 4 * 2 * 2**3
