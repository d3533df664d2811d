"""FP8 linears on real ranks: the same stored bits in every layout, the error of one device with such linears, and
predictions that hold to the byte.
"""

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_work import Run, prompts, whole_weight
from torch import Tensor

from headgrid.experiment.verify import Oracle, Trace, judge, judge_control
from headgrid.layout.layout import parse_layout
from headgrid.layout.quantised import is_quantised
from headgrid.layout.shards import parameters, stacks
from headgrid.layout.span import indices
from headgrid.runtime.launch import Job
from headgrid.runtime.launch import run as run_job

RIGHT = (
    Run("tp3:fp8", "llama"),
    Run("n1m3:batch+gathered+fp8"),
    Run("n1m3:batch+gathered+fp8", "llama", "float16"),
    Run("n1m3:sequence+sharded+fp8"),
    Run("tp3:dp-attention+fp8", "llama"),
    Run("n2m2:batch+gathered+fp8", "llama"),
    Run("n2m2:batch+gathered+sharded+fp8", "gpt", "float16"),
    Run("n2m2:gather+concat+fp8", "gpt", "float16"),
    Run("n2m2:scores+fp32+fp8", "llama", "float16"),
    Run("tp2pp2:fp8"),
    Run("n1m2pp2:batch+gathered+fp8"),
)
CONTROLS = {
    "no fp8": Run("n2m2:batch+gathered", "llama"),
    "fp8": Run("n2m2:batch+gathered+fp8", "llama"),
    "a softmax per slice": Run("n2m2:independent+fp8"),
    "scales of other rows": Run("tp2pp2:fp8", fault="scales of other rows"),
    "own scales": Run("tp2pp2:fp8", fault="own scales"),
}
Outcomes = list[dict[str, Any]]
JUDGED = slice(None, None, 2)  # sequences, some on each slice


@pytest.fixture(scope="module")
def outcomes(prepared: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Run, Outcomes]]:
    found: dict[Run, Outcomes] = {}
    for ranks in (3, 4):
        runs = [one for one in dict.fromkeys((*RIGHT, *CONTROLS.values())) if parse_layout(one.layout).ranks == ranks]
        folder = tmp_path_factory.mktemp(f"fp8-{ranks}")
        payload = {"runs": [astuple(one) for one in runs], "folder": str(folder)}
        run_job(Job("fp8_work:run", payload, ranks, "gloo"), log_to=Path(folder) / "logs")
        for k, one in enumerate(runs):
            found[one] = [torch.load(folder / f"{k}.{rank}.pt") for rank in range(ranks)]
    yield found


def _judged(one: Run, outcomes: Outcomes) -> tuple[Trace, dict[str, Any], Any]:
    last = next(outcome for outcome in outcomes if outcome["logits"] is not None)
    trace, text = Trace(last["logits"][JUDGED].float(), last["tokens"][JUDGED]), prompts(one)[JUDGED]
    oracle = Oracle(
        one.spec, lambda name: whole_weight(one, name), getattr(torch, one.dtype), torch.device("cpu"), text
    )
    truth = oracle.truth(trace.tokens, range(len(text)), lambda x: x, parse_layout(one.layout).linears)
    return trace, judge(trace, truth, one.dtype, len(outcomes), sensitive=True), truth


@pytest.mark.parametrize("one", RIGHT, ids=str)
def test_the_error_is_that_of_one_device_with_fp8_linears(one: Run, outcomes: dict[Run, Outcomes]) -> None:
    _, verdict, _ = _judged(one, outcomes[one])
    assert verdict["verified"], verdict["reason"]
    for phase in verdict["phases"].values():
        assert phase["floor"] > 10 * phase["unquantised_floor"], "FP8 is not what was computed"
        assert phase["relative_error"] > 0.5 * phase["floor"]


@pytest.mark.parametrize("name", ["a softmax per slice", "scales of other rows"])
def test_wrong_attention_and_wrong_scales_are_rejected(name: str, outcomes: dict[Run, Outcomes]) -> None:
    trace, verdict, truth = _judged(CONTROLS[name], outcomes[CONTROLS[name]])
    assert not verdict["verified"]
    assert "error above its bound" in verdict["reason"]
    assert judge_control(trace, truth, "float32", 4)["rejected"]


def _mismatches(one: Run, outcomes: Outcomes) -> list[str]:
    """Tensors of which some rank's stored bits are not those of the whole matrix, rounded here at once."""
    layout, wrong = parse_layout(one.layout), set[str]()
    for rank, outcome in enumerate(outcomes):
        shards, stored = parameters(one.spec, layout, rank), outcome["weights"]
        for stack, names in stacks(shards).items():
            if not is_quantised(layout, stack):
                continue
            start = 0
            for name in names:
                rows, columns = indices(shards[name].rows), indices(shards[name].cols or ())
                values, scales = _rounded(whole_weight(one, name))
                mine = slice(start, start + len(rows))
                start += len(rows)
                same = torch.equal(stored[stack][mine].view(torch.uint8), values[rows][:, columns])
                same &= torch.equal(stored[f"{stack.removesuffix('.weight')}.scale"][mine], scales[rows])
                wrong |= set() if same else {name}
    return sorted(wrong)


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    scales = matrix.float().abs().amax(1) / 448
    return (matrix.float() / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


@pytest.mark.parametrize("one", RIGHT, ids=str)
def test_stored_bits_are_those_of_the_whole_matrix(one: Run, outcomes: dict[Run, Outcomes]) -> None:
    assert _mismatches(one, outcomes[one]) == []
    kinds = {x.dtype for outcome in outcomes[one] for x in outcome["weights"].values()}
    assert kinds == {getattr(torch, one.dtype), torch.float8_e4m3fn, torch.float32}


@pytest.mark.parametrize("one", [one for one in RIGHT if "dp-attention" not in one.layout], ids=str)
def test_no_rank_holds_more_than_its_part_while_it_rounds(one: Run, outcomes: dict[Run, Outcomes]) -> None:
    for outcome in outcomes[one]:
        stored = max(x.numel() for x in outcome["weights"].values())
        assert outcome["largest"] == stored < whole_weight(one, "layers.0.mlp.down.weight").numel()


def test_scales_of_a_rank_s_own_part_are_other_bits(outcomes: dict[Run, Outcomes]) -> None:
    """Though the model hardly differs: its error could not tell."""
    one = CONTROLS["own scales"]
    wrong = _mismatches(one, outcomes[one])
    assert {name.split(".", 2)[2] for name in wrong} == {"attention.o.weight", "mlp.down.weight"}
    assert _judged(one, outcomes[one])[1]["verified"]


@pytest.mark.parametrize("one", RIGHT, ids=str)
def test_predictions_hold(one: Run, outcomes: dict[Run, Outcomes]) -> None:
    for outcome in outcomes[one]:
        measured, predicted = outcome["measured"], outcome["predicted"]
        assert outcome["as_predicted"] == [True, True]
        exact = ("parameters_bytes", "kv_cache_bytes", "communication_buffer_bytes")
        assert {key: measured[key] for key in exact} == {key: predicted[key] for key in exact}
        assert measured["activations_peak_bytes"] == pytest.approx(predicted["activations_peak_bytes"], rel=0.02)


def test_linears_are_stored_and_travel_in_a_quarter_of_fp32(outcomes: dict[Run, Outcomes]) -> None:
    """And their scales; embeddings, norms, biases and tokens as before."""
    plain, rounded = CONTROLS["no fp8"], CONTROLS["fp8"]
    layout = parse_layout(plain.layout)
    for rank, (before, after) in enumerate(zip(outcomes[plain], outcomes[rounded], strict=True)):
        shards = parameters(plain.spec, layout, rank)
        linears = {name: shard for name, shard in shards.items() if is_quantised(parse_layout(rounded.layout), name)}
        saved = sum(3 * shard.num_elements - 4 * shard.local_shape[0] for shard in linears.values())
        assert before["measured"]["parameters_bytes"] - after["measured"]["parameters_bytes"] == saved
        shared = ("attention.o.weight", "mlp.down.weight")  # all slices have the scales of whole rows
        kept = sum(4 * shard.local_shape[0] for name, shard in linears.items() if name.endswith(shared))
        assert before["gathered_bytes"] - after["gathered_bytes"] == saved + kept
