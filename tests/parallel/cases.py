"""The cases of parallel-equals-serial: a layout, a model that suits it and a workload, drawn once and for all by seed.

Every case is a value that its test id spells out, so that one of them can be run alone with -k.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from case import STEPS, Case, make_case
from draws import draw_heads, draw_model, draw_workload
from faults import FAULTS
from single import token_to_stop_at

from headgrid.layout.layout import EXCHANGES, OUTPUTS, parse_layout
from headgrid.layout.legal import check
from headgrid.spec.model import BIASES, ModelSpec
from headgrid.spec.workload import Workload

WORLD_SIZES = (2, 3, 4, 5, 6, 7, 8, 16, 24)
PAIRS = tuple(f"{exchange}+{output}" for exchange in EXCHANGES for output in OUTPUTS)
SHARDED = tuple(f"{exchange}+sharded" for exchange in EXCHANGES)
GATHERED = ("batch+gathered", "batch+gathered+sharded")
ALL = (*PAIRS, *SHARDED, *GATHERED)

# Degrees, and the options that they are run with; n2m2 meets every pair with every kind of model (`_kinds`).
BOTH = {
    2: {"n1m2": ALL},
    3: {"n1m3": ALL},
    4: {"n2m2": (*SHARDED, *GATHERED, *GATHERED), "n1m4": EXCHANGES, "n1m2pp2": GATHERED, "n1m2dp2": GATHERED},
    5: {"n1m5": (*EXCHANGES, *GATHERED)},
    6: {"n2m3": ALL, "n3m2": ALL, "n1m3pp2": ("batch+gathered",)},
    7: {"n1m7": (*EXCHANGES, *GATHERED)},
    8: {"n2m4": ALL, "n4m2": ALL, "n2m2pp2": (*EXCHANGES, *GATHERED), "n2m2dp2": (*SHARDED, *GATHERED)},
    16: {"n4m4": (*EXCHANGES, "batch+gathered"), "n2m8": SHARDED, "n8m2": EXCHANGES},
    24: {},
}
SINGLE = {
    2: ("tp2", "tp2:concat", "tp2:sharded", "pp2", "dp2"),
    3: ("tp3:sharded", "tp3:concat", "pp3"),
    4: ("tp4", "tp4:sharded", "tp2pp2:sharded", "pp4", "pp2dp2", "n1m2pp2:sequence+sharded", "n1m2dp2:gather+concat"),
    6: ("tp6", "tp3pp2:concat", "n1m6:sequence", "n1m3pp2:scores+sharded", "n1m3dp2:batch+concat"),
    8: ("tp8", "tp4pp2:sharded", "n1m8:gather", "n1m8:scores", "n1m4dp2:sequence", "n1m2pp2dp2:batch+concat"),
    16: (
        "n2m4pp2:batch+gathered",
        "n4m2pp2:gather+concat",
        "n4m2dp2:sequence+concat",
        "n2m2pp4:scores+sharded",
        "n2m2pp2dp2:sequence+sharded",
        "n2m2dp4:batch",
        "n1m16:gather",
        "n1m16:sequence",
    ),
}
# Shapes that people have (query heads, KV heads, head dim): most of them heads alone do not divide. The last ones have
# more ranks than KV heads, which tensor parallelism can only run by copying KV heads.
NAMED = (
    (8, 28, 4, 10, "n4m2:batch"),
    (8, 28, 4, 10, "n2m4:gather"),
    (8, 28, 4, 10, "n4m2:sequence+sharded"),
    (8, 28, 4, 10, "n2m4:scores"),
    (8, 28, 4, 8, "n1m4pp2:batch"),
    (4, 14, 2, 8, "n2m2:gather"),
    (4, 14, 2, 8, "n2m2:batch+concat"),
    (4, 14, 2, 8, "n2m2:sequence"),
    (6, 14, 2, 12, "n2m3:scores"),
    (6, 14, 2, 14, "n2m3:sequence+sharded"),
    (6, 14, 2, 14, "n2m3:batch+gathered"),
    (8, 14, 2, 8, "n2m4:sequence"),
    (8, 14, 2, 8, "n2m4:batch+sharded"),
    (16, 12, 4, 8, "n4m4:batch"),
    (16, 12, 12, 8, "n4m4:sequence+sharded"),
    (4, 10, 10, 8, "n2m2:scores"),
    (4, 20, 10, 8, "n1m4:sequence"),
    (24, 128, 8, 6, "n8m3:sequence+sharded"),
    (24, 128, 8, 6, "n8m3:batch"),
    (4, 8, 2, 6, "tp4"),
    (4, 8, 1, 6, "tp4:sharded"),
    (6, 6, 3, 8, "tp6:concat"),
    (8, 16, 4, 6, "tp8"),
    (16, 16, 8, 8, "tp16"),
)
# Attention by sequences: heads need not divide.
DP_ATTENTION = {
    2: ("tp2:dp-attention", "tp2:dp-attention+fp32", "tp2:dp-attention+overlapped"),
    3: ("tp3:dp-attention",),
    4: ("tp4:dp-attention", "tp2pp2:dp-attention", "tp2dp2:dp-attention", "tp2pp2:dp-attention+drained"),
    6: ("tp3pp2:dp-attention+fp32",),
    8: ("tp4dp2:dp-attention",),
}
OTHER_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A layout, and what must be true of its model."""

    layout: str
    heads: tuple[int, int, int] | None = None
    forced: dict[str, Any] = field(default_factory=dict)
    grouped: bool | None = None


def _kinds() -> Iterator[_Wanted]:
    """Every pair of exchange and output with every kind of model."""
    for pair, positions, biases, grouped in itertools.product(
        PAIRS, ("rotary", "learned"), ((), BIASES), (False, True)
    ):
        yield _Wanted(f"n2m2:{pair}", forced={"positions": positions, "linear_bias": biases}, grouped=grouped)


def _wanted(ranks: int) -> Iterator[_Wanted]:
    """What is wanted of a world size, one case each; every fifth with hidden states in fp32."""
    if ranks == 4:
        yield from _kinds()
    texts = [f"{degrees}:{option}" for degrees, options in BOTH[ranks].items() for option in options]
    texts += SINGLE.get(ranks, ())
    for number, text in enumerate(texts):
        fp32 = f"{text}{'+' if ':' in text else ':'}fp32" if number % 5 == 3 else text
        yield _Wanted(fp32)
    for p, h, k, d, text in NAMED:
        if p == ranks:
            yield _Wanted(text, heads=(h, k, d))
    for text in DP_ATTENTION.get(ranks, ()):
        yield _Wanted(text)


def _case(rng: random.Random, ranks: int, number: int, wanted: _Wanted) -> Case:
    layout = parse_layout(wanted.layout)
    dtype = OTHER_DTYPES[number // 4 % 3] if number % 4 == 3 and ranks < 24 else "float64"
    heads = wanted.heads or draw_heads(rng.choice, layout)
    while wanted.grouped is not None and (heads[0] > heads[1]) != wanted.grouped:
        heads = draw_heads(rng.choice, layout)
    model = draw_model(rng.choice, layout, heads, f"case {ranks}.{number}", **wanted.forced)
    if dtype != "float64":
        model = replace(model, attention_gain=2.0)
    workload = draw_workload(rng.choice, layout, model, dtype)
    case = make_case(f"P{ranks}.{number}", layout, model, workload, number)
    if number % 8 == 2 and case.steps:
        case = replace(case, id=f"{case.id}-stops", stop_token=token_to_stop_at(case))
    return case


@cache
def exact_cases() -> tuple[Case, ...]:
    """All cases that must agree with the reference."""
    cases: list[Case] = []
    for ranks in WORLD_SIZES:
        rng = random.Random(f"headgrid {ranks}")
        cases += [_case(rng, ranks, number, wanted) for number, wanted in enumerate(_wanted(ranks))]
    return tuple(cases)


def default_cases() -> tuple[Case, ...]:
    """All but every third on 6 and 8 ranks, and every other on 16, which take up to ten times as long as those on 2;
    `--full` runs all.
    """
    left_out: list[Case] = []
    for ranks, step in ((6, 3), (8, 3), (16, 2)):
        left_out += [case for case in exact_cases() if case.ranks == ranks][1::step]
    return tuple(case for case in exact_cases() if case not in left_out)


TINY = ModelSpec(
    name="tiny",
    num_layers=1,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_hidden_size=40,
    vocab_size=32,
    max_positions=20,
    attention_gain=3.0,
)
FAULTY_LAYOUTS = (
    "n2m2:gather+concat",
    "n2m2:batch",
    "n2m2:sequence",
    "n2m2:scores",
    "n2m2:batch+sharded",
    "n2m2:batch+gathered",
)
CORRUPTED = (
    # Layout, the rank whose results are altered, layers, sequences. With `sequence` slice 0 has the last position, and
    # with a sharded residual of four sequences each rank has one: else the last layer's results are of no consequence.
    ("tp4", 2, 1, 2),
    ("tp4:sharded", 2, 1, 4),
    ("n2m2:gather+concat", 1, 1, 2),
    ("n2m2:batch", 3, 1, 2),
    ("n2m2:batch+concat", 0, 1, 2),
    ("n2m2:sequence", 2, 2, 2),
    ("n2m2:sequence+sharded", 0, 1, 4),
    ("n2m2:scores", 3, 1, 2),
    ("n2m2:scores+sharded", 1, 1, 4),
    ("tp2pp2", 1, 2, 2),
    ("tp4pp2", 6, 2, 2),
    ("n2m2pp2:batch", 3, 2, 2),
    ("n2m2:batch+gathered", 1, 2, 2),
    ("n2m2:batch+gathered+sharded", 3, 1, 4),
    ("tp4:overlapped", 2, 1, 2),
    ("n2m2:sequence+overlapped", 2, 2, 2),
    ("tp2pp2:drained", 1, 2, 2),
    ("tp4:dp-attention", 2, 1, 4),
)


def _tiny(name: str, text: str, layers: int, batch: int) -> Case:
    layout = parse_layout(text)
    model = replace(TINY, num_layers=layers, num_kv_heads=max(TINY.num_kv_heads, layout.num_head_groups))
    workload = Workload(batch=batch, seq=8, decode_steps=STEPS, dtype="float64")
    check(model, layout, workload, layout.ranks)
    return Case(f"{text}-{name}", model, layout, workload, seed=7)


def faulty_cases(names: Sequence[str] = tuple(FAULTS)) -> list[Case]:
    """Every fault on every layout to which it applies. No fault ("") is among them: without one, the comparison must
    accept.
    """
    cases: list[Case] = []
    for text in FAULTY_LAYOUTS:
        plain = _tiny("no fault", text, layers=2, batch=3)
        cases.append(plain)
        cases += [_faulty(plain, name) for name in names if FAULTS[name].applies(plain.layout)]
    return cases


def _faulty(plain: Case, name: str) -> Case:
    workload = replace(plain.workload, **FAULTS[name].workload)
    stop = token_to_stop_at(plain) if FAULTS[name].shows == "tokens" else None
    return replace(plain, id=f"{plain.layout}-{name}", fault=name, workload=workload, stop_token=stop)


def corrupted_cases() -> list[Case]:
    """Layouts of which one rank's collectives are corrupted, one after the other."""
    return [
        replace(_tiny(f"rank {rank}", text, layers, batch), corrupted_rank=rank)
        for text, rank, layers, batch in CORRUPTED
    ]


GEMMA: dict[str, Any] = {
    **{"norm": "rms", "norm_unit_offset": True, "norm_placement": "both", "gated_mlp": True, "qk_norm": True},
    **{"tied_embeddings": True, "embedding_scale": 8.0, "final_logit_softcapping": 9.0, "local_rope_theta": 50.0},
    **{"sliding_window": 9, "full_attention_layers": (1,)},
}
BERT: dict[str, Any] = {
    **{"norm_placement": "post", "embedding_norm": True, "token_types": 2, "positions": "learned", "head": "none"},
    **{"is_causal": False, "linear_bias": BIASES, "gated_mlp": False},
}
MEASURED: dict[str, tuple[str, ...]] = {
    "even": (
        *("tp4", "tp4:concat", "tp4:sharded", "tp4:sharded+fp32", "tp2pp2", "dp4", "n2m2:gather", "n2m2:gather+concat"),
        *("n2m2:batch", "n2m2:batch+concat", "n2m2:batch+sharded", "n2m2:batch+gathered", "n1m4:batch+gathered"),
        "tp4:dp-attention",
        *("n2m2:sequence", "n2m2:sequence+sharded", "n2m2:scores"),
    ),
    "chunked": (
        "tp2pp2:sharded",
        "tp2pp2:dp-attention",
        "n2m2:gather",
        "n2m2:batch+gathered",
        "n1m4:sequence",
        "n2m2:scores",
    ),
    "uneven": (
        *(
            "tp3:sharded+fp32",
            "n1m3:gather",
            "n1m3:batch+concat",
            "n1m3:batch+gathered",
            "n1m3:sequence",
            "n1m3:scores",
        ),
        "n1m3:sequence+sharded",
        "tp3:dp-attention",
    ),
    "half": (
        "tp4:dp-attention+fp32",
        "n2m2:sequence+sharded+fp32",
        "n1m2pp2:gather+fp32",
        "n2m2:batch+gathered+sharded",
        "n2m2:scores",
    ),
    "windowed": ("tp4", "n2m2:batch", "n2m2:sequence"),
    "llama": ("tp2pp2:sharded", "n2m2:batch", "n2m2:batch+gathered", "n1m3:scores"),
    "gemma": ("tp4:dp-attention", "n2m2:sequence+sharded+fp32", "n1m4:batch"),
    "bert": ("tp2:dp-attention", "n2m2:batch+gathered", "n2m2:sequence", "tp2:sharded+fp32"),
}
"""Layouts by what is special about their model and workload."""


def measured_cases(fault: str = "") -> list[Case]:
    """Layouts whose memory is measured: large enough for their tensors to outweigh indices and other odds and ends."""
    sizes = {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "mlp_hidden_size": 128, "max_positions": 80}
    model = replace(TINY, num_layers=2, **sizes)
    workload = Workload(batch=8, seq=64, decode_steps=STEPS, dtype="float32")
    odd = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 14, "hidden_size": 50, "mlp_hidden_size": 101}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "even": ({}, {}),
        "chunked": ({}, {"chunk_positions": 16}),
        "uneven": (
            odd | {"vocab_size": 61, "rotary_dim": 6},
            {"batch": 7, "seq": 61, "prompt_lengths": (5, 61, 1, 9, 61, 60, 33)},
        ),
        "half": ({"qk_norm": True, "linear_bias": ("qkv", "o", "mlp")}, {"dtype": "bfloat16"}),
        "windowed": ({"sliding_window": 9, "full_attention_layers": (1,), "attn_logit_softcapping": 3.0}, {}),
        "llama": ({"norm": "rms", "gated_mlp": True, "activation": "silu", "linear_bias": ("qkv",)}, {}),
        "gemma": (GEMMA, {"dtype": "bfloat16"}),
        "bert": (BERT, {"decode_steps": 0, "every_token": True}),
    }
    found: list[Case] = []
    for kind, texts in MEASURED.items():
        for text in texts:
            case = replace(model, **changes[kind][0]), parse_layout(text), replace(workload, **changes[kind][1])
            found.append(Case(f"{text}-{kind} memory{fault and ' '}{fault}", *case, 7, fault, memory=True))
    return found
