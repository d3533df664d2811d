"""Grids of cases: every cut of a layer, and every layout that `check` accepts for one small model."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from case import Case, make_case
from draws import candidates, draw_model

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, Layout
from headgrid.layout.legal import check, is_legal
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload

MOST_RANKS = 16


def cuts() -> list[tuple[int, int]]:
    """Every (n, m) with n m <= 16."""
    return [(n, p // n) for p in range(1, MOST_RANKS + 1) for n in range(1, p + 1) if p % n == 0]


@cache
def cut_cases() -> tuple[Case, ...]:
    """Every cut with each of its exchanges: K = n or 2 n KV heads, channels that m divides or does not."""
    found: list[Case] = []
    for n, m in cuts():
        for number, exchange in enumerate(EXCHANGES if m > 1 else ("none",)):
            rng = random.Random(f"cut {n} {m} {exchange}")
            layout = Layout(num_head_groups=n, num_dim_slices=m, exchange=exchange)  # type: ignore[arg-type]
            kv, group = n * (1 + (n + number) % 2) if n < 9 else n, 1 + (m + number) % 2
            heads = kv * group, kv, 2 * m + 2 * ((n + number) % 3)
            name = f"cut {n} {m}"
            model = draw_model(rng.choice, layout, heads, name, is_causal=True, positions="rotary")
            if model.head_dim == 2:  # one pair for each head
                model = replace(model, rotary_dim=0)
            batch, chunk = rng.choice((2, 3, 5)), rng.choice((0, 5))
            workload = Workload(batch=batch, seq=9, decode_steps=2, dtype="float64", chunk_positions=chunk)
            found.append(make_case("cut", layout, model, workload, seed=n * 100 + m))
    return tuple(found)


AWKWARD = ModelSpec(
    name="awkward",
    num_layers=3,
    hidden_size=26,
    num_heads=12,
    num_kv_heads=6,
    head_dim=34,
    rotary_dim=32,
    mlp_hidden_size=43,
    vocab_size=37,
    max_positions=20,
    linear_bias=("qkv", "o", "mlp"),
    attention_gain=3.0,
)
WORKLOADS = (
    Workload(batch=5, seq=9, decode_steps=2, dtype="float64"),
    Workload(
        batch=5,
        seq=9,
        decode_steps=2,
        dtype="float64",
        chunk_positions=4,
        chunk_tokens=12,
        prompt_lengths=(9, 2, 5, 8, 1),
    ),
    Workload(batch=17, seq=5, decode_steps=2, dtype="float64", prompt_lengths=(5, 1, 4) * 5 + (3, 5)),
)


def accepted(layout: Layout, workload: Workload) -> bool:
    """Whether `check` lets the awkward model run; the only filter there is. (To word a refusal takes it long, and what
    is no layout of the model is refused whatever the workload.)
    """
    if not is_legal(AWKWARD, layout):
        return False
    try:
        check(AWKWARD, layout, workload, layout.ranks)
    except InvalidLayout:
        return False
    return True


def every_layout(ranks: int) -> Iterator[Layout]:
    """All that does not contradict itself, whatever the model, of all degrees whose product is `ranks`."""
    for of_same_degrees in candidates(ranks):
        yield from of_same_degrees


def accepted_cases(ranks: int, *, all_workloads: bool) -> list[Case]:
    """Every accepted layout, with all workloads that go with it or with one after the other in turn.

    Hidden states in fp32 differ only where a model computes in 16 bits: there they are run so.
    """
    found: list[Case] = []
    for number, layout in enumerate(every_layout(ranks)):
        turn = number % len(WORKLOADS)
        mine = [w for w in (*WORKLOADS[turn:], *WORKLOADS[:turn]) if accepted(layout, w)]
        for workload in mine if all_workloads else mine[:1]:
            kind = WORKLOADS.index(workload)
            if layout.residual_dtype == "fp32":
                workload = replace(workload, dtype="bfloat16")
            found.append(Case(f"P{ranks}-{layout}-workload{kind}", AWKWARD, layout, workload, seed=1))
    return found
