"""Data-parallel attention on real ranks: what is done wrong is found, and it is not what sharded tensor parallelism is.

That it computes what one device computes, with what is predicted, is among the cases of `test_exactness`,
`test_random_cases`, `test_corruption` and `test_memory`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from case import STEPS, Case
from cases import TINY
from faults import OTHERS_POSITIONS, SWAPPED_SUMS
from oracle import FP64_BOUND, judge, prove_sensitive

from headgrid.layout.layout import parse_layout
from headgrid.spec.workload import Workload

CLEAR = 1e-3  # a fault must show as one, not as rounding
UNEVEN = Case(
    "three ranks, seven sequences",
    replace(TINY, num_layers=2, num_heads=5, num_kv_heads=1, mlp_hidden_size=41, vocab_size=31),
    parse_layout("tp3:dp-attention"),
    Workload(batch=7, seq=8, decode_steps=STEPS, dtype="float64", prompt_lengths=(8, 3, 5, 6, 2, 8, 4)),
    seed=7,
)
SOUND = replace(UNEVEN, id="three ranks, six sequences", workload=replace(UNEVEN.workload, batch=6, prompt_lengths=()))
FAULTS = {
    # How wrong prefill is, and decode: what is wrong with the cache shows behind the prompt.
    SWAPPED_SUMS: (True, True),
    "partial sum dropped": (True, True),
    "RoPE frequencies reversed": (True, True),
    "no causal mask": (True, True),
    "prefill not cached, zeros left": (False, True),
    "decode not cached, zeros left": (False, True),
}


@pytest.mark.parametrize("case", [UNEVEN, SOUND], ids=lambda case: case.id)
def test_uneven_sequences_are_exact_and_as_predicted(case: Case, outcomes: Callable) -> None:
    found = outcomes(case)
    prove_sensitive(case, found)
    verdict = judge(case, found)
    assert not verdict.complaints, "\n".join(verdict.complaints)


def test_calls_in_which_some_rank_has_no_sequence_are_exact(outcomes: Callable) -> None:
    """Seven sequences in calls of at most three, prompts in chunks: in the last call two ranks only wait."""
    workload = replace(UNEVEN.workload, chunk_positions=4, chunk_tokens=12)
    case = replace(UNEVEN, id="idle ranks", workload=workload)
    verdict = judge(case, outcomes(case))
    assert not verdict.complaints, "\n".join(verdict.complaints)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_rejected(fault: str, outcomes: Callable) -> None:
    wrong = replace(SOUND, id=f"dp-attention {fault}", fault=fault)
    verdict = judge(replace(wrong, fault=""), outcomes(wrong))
    assert verdict.complaints
    for phase, shows in zip(("prefill", "decode"), FAULTS[fault], strict=True):
        error = verdict.errors[f"{phase} logits"][0]
        assert error > CLEAR if shows else error < FP64_BOUND, (phase, error)


def test_a_rank_with_the_positions_of_another_ones_sequences_is_rejected(outcomes: Callable) -> None:
    """Prompts of different lengths: prefill is right, what follows them is not."""
    lengths = replace(SOUND.workload, prompt_lengths=(8, 7, 5, 4, 2, 3))
    wrong = replace(SOUND, id=OTHERS_POSITIONS, fault=OTHERS_POSITIONS, workload=lengths)
    verdict = judge(replace(wrong, fault=""), outcomes(wrong))
    assert verdict.errors["prefill logits"][0] < FP64_BOUND
    assert verdict.errors["decode logits"][0] > CLEAR


def test_the_predictions_for_tensor_parallelism_do_not_pass(outcomes: Callable) -> None:
    """Sharded hidden states in either, and as much cache; but other collectives, operations and weights."""
    found, cut = outcomes(UNEVEN), replace(UNEVEN, layout=parse_layout("n1m3:sequence+sharded"))
    complaints = judge(cut, found).complaints
    for what in ("prefill of rank", "decode of rank", "prefill FLOPs", "decode FLOPs", "weight bytes"):
        assert any(complaint.startswith(what) for complaint in complaints), what
