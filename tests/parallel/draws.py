"""Draws legal combinations of layout, model and workload. `pick` chooses from a sequence: a seeded generator's choice
for cases that are always the same, hypothesis' for those that it shrinks; simpler values come first.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from case import STEPS

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import (
    ATTENTIONS,
    COMMUNICATIONS,
    EXCHANGES,
    OUTPUTS,
    RESIDUAL_DTYPES,
    RESIDUALS,
    WEIGHT_MODES,
    Layout,
)
from headgrid.spec.model import ModelSpec
from headgrid.spec.rope import RopeScaling
from headgrid.spec.workload import Workload

Pick = Callable[[Sequence[Any]], Any]
ROOM = 20

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"sliding_window": 4},
    {"sliding_window": 3, "full_attention_layers": (1,)},
    {"attn_logit_softcapping": 3.0, "attention_scale": 0.4},
    {"qk_norm": True},
    {"is_causal": False},
    {"qk_norm": True, "attn_logit_softcapping": 5.0, "sliding_window": 5},
    {"norm": "rms", "gated_mlp": True, "activation": "silu", "linear_bias": ("qkv",)},
    {
        **{
            "norm": "rms",
            "norm_unit_offset": True,
            "norm_placement": "both",
            "gated_mlp": True,
            "embedding_scale": 5.0,
        },
        **{"qk_norm": True, "sliding_window": 4, "full_attention_layers": (1,), "local_rope_theta": 50.0},
        **{"final_logit_softcapping": 9.0, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    },
    {"norm_placement": "post", "embedding_norm": True, "token_types": 2, "activation": "relu"},
)
DTYPES = ("float64", "float32", "bfloat16", "float16")


def degrees(ranks: int) -> Iterator[dict[str, int]]:
    """All n, m, pp, dp whose product is `ranks`."""
    divisors = [k for k in range(1, ranks + 1) if ranks % k == 0]
    for pp, dp, m in itertools.product(divisors, repeat=3):
        if ranks % (m * pp * dp) == 0:
            yield {"num_head_groups": ranks // (m * pp * dp), "num_dim_slices": m, "pp": pp, "dp": dp}


def consistent(sizes: dict[str, int]) -> Iterator[Layout]:
    """Every layout of these degrees that does not contradict itself. None is left out but the control `independent`,
    which is wrong on purpose.
    """
    options = ("none", *EXCHANGES), OUTPUTS, WEIGHT_MODES, RESIDUALS, RESIDUAL_DTYPES, COMMUNICATIONS, ATTENTIONS
    names = ("exchange", "output", "weights", "residual", "residual_dtype", "communication", "attention")
    for choice in itertools.product(*options):
        try:
            yield Layout(**sizes, **dict(zip(names, choice, strict=True)))  # type: ignore[arg-type]
        except InvalidLayout:
            continue


@cache
def candidates(ranks: int) -> tuple[tuple[Layout, ...], ...]:
    """All self-consistent layouts on so many ranks, those of the same degrees together."""
    return tuple(tuple(consistent(sizes)) for sizes in degrees(ranks))


def draw_layout(pick: Pick, ranks: int) -> Layout:
    return pick(pick(candidates(ranks)))


def draw_heads(pick: Pick, layout: Layout) -> tuple[int, int, int]:
    """Query heads, KV heads, head dim: multi-head, grouped, a single KV head or copied ones; uneven slices, too."""
    n, m = layout.num_head_groups, layout.num_dim_slices
    even = 2 * m * max(1, pick((2, 3)) * 2 // m)
    dim = even + pick((0, 0, 2, 4, 1))
    if layout.attention == "dp-attention":  # heads stay together, however many there are
        kv = pick((1, 2, 3))
        return kv * pick((1, 2, 3)), kv, dim
    if m == 1 and n > 1 and pick((False, False, True)):
        kv = pick([k for k in range(1, n) if n % k == 0])
        return n * pick((1, 2)), kv, dim
    kv = n * pick((1, 1, 2))
    return kv * pick((1, 2, 3)), kv, dim


def draw_model(
    pick: Pick, layout: Layout, heads: tuple[int, int, int], name: str = "drawn", **forced: Any
) -> ModelSpec:
    """A tiny model with peaky attention; sizes of the MLP, the vocabulary and the hidden state seldom divide."""
    d = heads[2]
    rotary = pick((0, 0, 2 * (d // 4))) if d % 2 == 0 else 2 * (d // 4)
    positions = forced.get("positions") or pick(("rotary", "rotary", "learned"))
    values = {
        "num_layers": layout.pp + (layout.ranks < 16 and layout.pp < 3 and pick((0, 0, 1))),
        "hidden_size": pick((24, 32, 36, 50)),
        "mlp_hidden_size": pick((40, 64, 67)),
        "vocab_size": pick((32, 41, 53)),
        "positions": positions,
        "rotary_dim": rotary if positions == "rotary" else 0,
        "rope_theta": pick((100.0, 10_000.0)),
        "activation": pick(("gelu", "gelu_tanh")),
        "linear_bias": pick(((), ("qkv", "o", "mlp"))),
        "tied_embeddings": pick((False, False, True)),
    } | (pick(VARIANTS) | forced)
    every = values.get("full_attention_layers", ())
    values["full_attention_layers"] = tuple(layer for layer in every if layer < values["num_layers"])
    return ModelSpec(
        name=name,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=d,
        max_positions=ROOM,
        **{"attention_gain": 2.0 if values.get("qk_norm") else 3.0} | values,  # type: ignore[arg-type]
    )


def draw_workload(pick: Pick, layout: Layout, model: ModelSpec, dtype: str = "float64", steps: int = STEPS) -> Workload:
    """A few sequences, often fewer than slices or stages; of their own lengths, in several calls, in chunks."""
    gathered_stages = layout.weights == "gathered" and layout.pp > 1
    least = layout.dp * (layout.num_dim_slices if gathered_stages else 1)
    if layout.attention == "dp-attention":
        least = layout.dp * layout.tp
    if layout.communication == "overlapped":  # somewhere two calls of different sequences
        least = max(least, layout.dp * layout.row_owners + 1)
    batch = max(least, pick((1, 2, 3, 5, 7) if layout.ranks < 16 and layout.pp == 1 else (1, 2, 3, 5)))
    if dtype != "float64":  # an error is compared with another one, so it takes many tokens to tell a bug from chance
        batch += 8
    seq = pick((8, 9, 11, 12))
    lengths = tuple(pick((seq, 1, 5, seq - 1)) for _ in range(batch)) if pick((False, False, True)) else ()
    chunk = pick((0, 0, 3, 4, 5)) if model.is_causal else 0
    calls = pick((16_384, 16_384, 2 * seq, 3 * seq)) if layout.ranks < 16 else 16_384
    return Workload(
        batch=batch,
        seq=seq,
        decode_steps=steps if model.is_causal else 0,
        dtype=dtype,  # type: ignore[arg-type]
        chunk_tokens=calls,
        chunk_positions=chunk,
        prompt_lengths=lengths,
    )
