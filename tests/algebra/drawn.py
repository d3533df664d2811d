"""Cases of the exactness suite, drawn by whoever chooses numbers: a seeded generator, or hypothesis."""

import random
from collections.abc import Callable
from typing import Any

from halves import Case

from headgrid.layout.layout import EXCHANGES, Layout
from headgrid.layout.legal import check
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MAX_RANKS = 16
ALL_EXCHANGES = ("none", *EXCHANGES)
Choose = Callable[[int, int], int]
"""A whole number between two, both included; the simplest is the first."""


def degrees(exchange: str, most: int = MAX_RANKS) -> list[tuple[int, int]]:
    """Every (n, m) on at most so many ranks: m = 1 where there is nothing to exchange, else m > 1."""
    sizes = range(1, most + 1)
    return [(n, m) for n in sizes for m in sizes if n * m <= most and (m == 1) == (exchange == "none")]


def one_of(choose: Choose, *values: Any) -> Any:
    return values[choose(0, len(values) - 1)]


def draw_case(choose: Choose, exchange: str, n: int, m: int, *, is_causal: bool = True, decoded: bool = False) -> Case:
    """A legal case for n head groups and m slices: MHA, GQA or MQA, any rotation, mask and options; `decoded` has at
    least one step of a decode.
    """
    model = _model(choose, exchange, n, m, is_causal)
    seq, batch = choose(1, 9), choose(1, 4)
    steps = choose(int(decoded), 3) if is_causal else 0
    workload = Workload(
        batch=batch,
        seq=seq,
        decode_steps=steps,
        dtype="float64",
        chunk_tokens=one_of(choose, 16_384, seq, 2 * seq),
        chunk_positions=one_of(choose, 0, choose(1, seq)) if is_causal else 0,
        prompt_lengths=tuple(choose(1, seq) for _ in range(batch)) if choose(0, 1) else (),
    )
    options = one_of(choose, {}, {"residual": "sharded"}, {"output": "concat"}) if n * m > 1 else {}
    layout = Layout(num_head_groups=n, num_dim_slices=m, exchange=exchange, **options)  # type: ignore[arg-type]
    model = _sized(model, workload.cache_positions, one_of(choose, 0, 0, choose(1, seq)) if is_causal else 0)
    check(model, layout, workload)
    return Case(model, layout, workload, choose(0, 1 << 20))


def _model(choose: Choose, exchange: str, n: int, m: int, is_causal: bool) -> dict[str, Any]:
    kv_heads, d = n * choose(1, max(1, 4 // n)), 2 * m + choose(0, 5)
    copies = [k for k in range(1, n) if n % k == 0] if exchange == "none" else []
    if copies and not choose(0, 2):  # tensor parallelism with more ranks than KV heads copies them
        kv_heads = one_of(choose, *copies)
    group = max(n // kv_heads, 1) * choose(1, 3)
    positions = one_of(choose, "rotary", "partial", "learned")
    d += d % 2 if positions == "rotary" else 0
    return {
        "name": "drawn",
        "num_layers": 1,
        "hidden_size": max(4, n * m) + choose(0, 6),
        "num_heads": kv_heads * group,
        "num_kv_heads": kv_heads,
        "head_dim": d,
        "mlp_hidden_size": MAX_RANKS,
        "vocab_size": MAX_RANKS,
        "positions": "learned" if positions == "learned" else "rotary",
        "rotary_dim": 2 * choose(1, d // 2) if positions == "partial" else 0,
        "linear_bias": ("qkv", "o", "mlp") if choose(0, 1) else (),
        "is_causal": is_causal,
        "attention_scale": one_of(choose, None, None, 0.3),
        "attn_logit_softcapping": one_of(choose, 0.0, 0.0, 1.5),
        "qk_norm": not choose(0, 2),
    }


def _sized(model: dict[str, Any], positions: int, window: int) -> ModelSpec:
    return ModelSpec(**model, max_positions=positions, sliding_window=window)


def seeded_case(exchange: str, n: int, m: int, **options: bool) -> Case:
    """The one case that these numbers name."""
    rng = random.Random(f"{exchange} {n} {m} {options}")
    return draw_case(rng.randint, exchange, n, m, **options)


def features(case: Case) -> dict[str, bool]:
    """What may be special about a case, and whether it is."""
    model, layout, workload = case.model, case.layout, case.workload
    n, m, h, kv = layout.num_head_groups, layout.num_dim_slices, model.num_heads, model.num_kv_heads
    return {
        "one query head a KV head": h == kv,
        "grouped": h > kv > 1,
        "one KV head": kv == 1 < h,
        "whole rotation": model.rotated_dim == model.head_dim,
        "partial rotation": 0 < model.rotated_dim < model.head_dim,
        "no rotation": model.rotated_dim == 0,
        "bidirectional": not model.is_causal,
        "window": model.sliding_window > 0,
        "soft cap": model.attn_logit_softcapping > 0,
        "head norms": model.qk_norm,
        "biases": model.linear_bias,
        "own scale": model.attention_scale is not None,
        "ragged": len(set(workload.lengths)) > 1,
        "chunks of positions": 0 < workload.chunk_positions < workload.seq,
        "several calls": workload.chunk_tokens < workload.batch * workload.seq,
        "decode": workload.decode_steps > 0,
        "sharded residual": layout.residual == "sharded",
        "concatenated output": layout.output == "concat",
        "uneven slices": m > 1 and model.head_dim % m > 0,
        "fewer sequences than slices": workload.batch < m,
        "fewer positions than slices": workload.seq < m,
        "copied KV heads": kv % n > 0,
    }


def possible(exchange: str) -> set[str]:
    """The features that cases of an exchange can have."""
    of_slices = {"uneven slices", "fewer sequences than slices", "fewer positions than slices"}
    return set(features(seeded_case(exchange, 1, 1 if exchange == "none" else 2))) - (
        of_slices if exchange == "none" else {"copied KV heads"}
    )
