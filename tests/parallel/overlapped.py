"""Cases of layouts whose calls take turns in prefill."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from case import STEPS, Case
from cases import TINY, measured_cases

from headgrid.layout.layout import parse_layout
from headgrid.layout.legal import check
from headgrid.spec.model import BIASES
from headgrid.spec.workload import Workload

LENGTHS = (8, 1, 5, 7, 2, 8, 3, 6, 4)
# What is special about a model and its workload: changes to TINY, and to five or nine sequences of 8 tokens.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({}, {}),
    "ragged": ({"qk_norm": True, "linear_bias": BIASES}, {"prompt_lengths": LENGTHS}),
    "bidirectional": ({"is_causal": False, "gated_mlp": True}, {"decode_steps": 0}),
    "float32": ({"attention_gain": 2.0}, {"dtype": "float32", "batch": 13}),
    "ragged chunks": (
        {"sliding_window": 4, "positions": "learned"},
        {"chunk_positions": 3, "chunk_tokens": 6, "prompt_lengths": LENGTHS},
    ),
    "chunks": ({}, {"chunk_positions": 3, "chunk_tokens": 3}),
}
LAYOUTS = (
    *("tp2", "tp2:sharded", "n1m2:batch", "n1m2:gather+concat", "n1m2:sequence", "n1m2:scores"),
    *("tp3:sharded", "n1m3:batch+sharded", "n1m3:sequence+sharded", "n1m3:scores"),
    *("tp4", "tp2pp2", "tp2pp2:sharded+fp32", "tp2dp2", "n2m2:batch", "n2m2:batch+concat", "n2m2:gather"),
    *("n2m2:sequence", "n2m2:scores+sharded", "n2m2:batch+gathered", "n2m2:batch+gathered+sharded"),
    *("n1m2pp2:batch", "n1m2pp2:sequence", "n1m2dp2:batch"),
    *("tp4pp2:concat", "n2m2pp2:batch+gathered", "n2m2pp2:sequence+sharded", "n2m2dp2:batch+gathered"),
)


def case_of(text: str, kind: str, *, exposed: bool = False, **work: Any) -> Case:
    """One kind of work on the layout `text`, overlapped unless it is to be `exposed`; `work` changes the workload."""
    layout = parse_layout(text if exposed else f"{text}{'+' if ':' in text else ':'}overlapped")
    kv_heads = max(TINY.num_kv_heads, layout.num_head_groups)
    sizes = {"num_layers": 2, "num_heads": 2 * kv_heads, "num_kv_heads": kv_heads, "mlp_hidden_size": 41}
    model = replace(TINY, **sizes | KINDS[kind][0])
    usual: dict[str, Any] = {"batch": 9 if layout.dp > 1 else 5, "seq": 8, "decode_steps": STEPS, "dtype": "float64"}
    chosen = usual | KINDS[kind][1] | work
    lengths = chosen.pop("prompt_lengths", ())[: chosen["batch"]]
    workload = Workload(**chosen, prompt_lengths=lengths)
    check(model, layout, workload, layout.ranks)
    return Case(f"{layout}-{kind}", model, layout, workload, seed=11)


# Of the cases whose memory is measured, those that hold most where a call waits, and some that hold it in between.
REACHED = (
    "tp4-even",
    "tp4:sharded-even",
    "tp2pp2-even",
    "n2m2:batch-even",
    "n2m2:batch-llama",
    "tp2:sharded+fp32-bert",
)
BOUNDED = ("n2m2:batch+gathered-even", "n2m2:gather-even", "n2m2:sequence-even", "n2m2:scores-even", "tp4-windowed")
BOUNDED += ("n2m2:gather-chunked", "n1m3:sequence-uneven", "n1m2pp2:gather+fp32-half", "n2m2:batch+gathered-bert")


def overlapped_memory_cases(names: Sequence[str], fault: str = "") -> list[Case]:
    """Their layouts overlapped, in calls of a sequence or a sequence for each slice."""
    known = {case.id.removesuffix(" memory"): case for case in measured_cases()}
    found: list[Case] = []
    for name in names:
        case = known[name]
        layout = replace(case.layout, communication="overlapped")
        workload = replace(case.workload, chunk_tokens=case.workload.seq)
        changes = {"layout": layout, "workload": workload, "fault": fault}
        found.append(replace(case, id=f"{name} overlapped {fault or 'memory'}", **changes))
    return found


def overlapped_cases() -> list[Case]:
    """Every layout in chunks, of even or of different lengths, and with one other kind of work."""
    found: list[Case] = []
    for number, (text, other) in enumerate(zip(LAYOUTS, cycle(tuple(KINDS)[:4]), strict=False)):
        chunks = "chunks" if number % 2 else "ragged chunks"
        found += [case_of(text, kind) for kind in (other, chunks)]
    return found
