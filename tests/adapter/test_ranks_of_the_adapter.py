"""What only several ranks show: caches divided, random numbers and stopping shared, refusals on every rank alike."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import Jobs
from adapter_judge import disagreements, relative
from adapter_models import build, prompts
from adapter_scenarios import SCENARIOS

import headgrid

pytestmark = pytest.mark.timeout(1200)  # the first test waits for all jobs
LAYOUT = "n1m4:sequence"
ROOT, EXAMPLE = Path(headgrid.__file__).parent.parent, "examples/transformers_adapter.py"
CACHES = {
    "n2m2:batch": 1 / 4,
    "n1m4:sequence": 1 / 4,
    "n2m2:scores": 1 / 4,
    "n1m4:batch": 1 / 4,
    "n2m2:gather": (1 + 1 / 2) / 2 / 2,  # K whole in each of 2 groups, V in halves
}
"""The share of the whole KV cache on the rank that holds the most."""
JOBS = ("corrupted", "rounded", "own_seeds", "own_prompts", "own_criteria")

Found = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found in a job of this module; all run in one launch."""
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    jobs: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {"layout": LAYOUT}) for name in JOBS}
    jobs |= {f"cache {layout}": ("cached", {"layout": layout, "rows": 4}) for layout in CACHES}
    jobs["folder"] = ("from_folder", {"layout": "n2m2:batch", "folder": str(folder)})
    jobs["three ranks"] = ("scenarios", {"family": "llama", "layout": "n1m3:batch", "names": [], "changes": {}})
    wanted: Jobs = list(jobs.values())
    return dict(zip(jobs, launch(4, wanted), strict=True)).__getitem__


def test_a_wrong_weight_on_one_rank_is_noticed(found: Found, expected) -> None:
    """The negative control of every comparison here."""
    for rank in found("corrupted"):
        assert disagreements(rank, expected("llama", "logits"))


def test_in_bf16_it_is_as_near_as_one_process(found: Found, expected) -> None:
    truth, alone = expected("llama", "logits")["logits"], SCENARIOS["logits"](build("llama").bfloat16())["logits"]
    floor = relative(alone.float(), truth)
    assert floor > 1e-3
    for rank in found("rounded"):
        assert rank["logits"].dtype == torch.bfloat16
        assert relative(rank["logits"].float(), truth) < 1.5 * floor


def test_all_ranks_sample_with_the_first_rank_s_random_numbers(found: Found) -> None:
    model = build("llama")
    truths = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        truths.append(model.generate(**prompts(), do_sample=True, max_new_tokens=8))
    assert not torch.equal(*truths), "the seed matters"
    for rank in found("own_seeds"):
        assert torch.equal(rank["tokens"], truths[0])


def test_all_ranks_stop_when_the_first_does(found: Found, expected) -> None:
    columns = prompts()["input_ids"].shape[1] + 3
    for rank in found("own_criteria"):
        assert torch.equal(rank["tokens"], expected("llama", "greedy")["tokens"][:, :columns])


def test_different_prompts_are_refused_on_every_rank(found: Found) -> None:
    for rank in found("own_prompts"):
        assert "different tokens" in rank["error"] and "the same prompts on every rank" in rank["error"]


def test_a_layout_of_other_ranks_is_refused(found: Found) -> None:
    for rank in found("three ranks"):
        assert "needs 3 ranks, not 4" in rank["error"] and "n1m4:batch" in rank["error"]


@pytest.mark.parametrize("layout", CACHES)
def test_the_cache_is_divided_as_the_exchange_says(layout: str, found: Found) -> None:
    model = build("llama").config
    room = 20 + 12 - 1  # generate says what it may need: the last token is never cached
    whole = 2 * model.num_hidden_layers * 4 * room * model.num_key_value_heads * model.head_dim * 4
    held = found(f"cache {layout}")
    assert {rank["room"] for rank in held} == {room}
    uneven = 1.15 if "batch" not in layout else 1  # 31 positions on 4 slices; 10 channels on 2 are 6 and 4, and even
    assert max(rank["bytes"] for rank in held) <= whole * CACHES[layout] * uneven
    gathers = "gather" in layout
    assert sum(rank["bytes"] for rank in held) == (whole * 1.5 if gathers else whole)


def test_weights_are_read_from_a_folder(found: Found, expected) -> None:
    for rank in found("folder"):
        seen = rank.pop("progress")
        assert seen and seen[-1][0] == seen[-1][1] > 0
        assert disagreements(rank, expected("llama", "greedy")) == []


def test_an_example_runs_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    several = _example("n1m2:sequence", 2)
    monkeypatch.setattr(sys, "argv", [EXAMPLE, "--layout", "tp1"])
    runpy.run_path(str(ROOT / EXAMPLE), run_name="__main__")  # one device needs no process of its own
    truth = capsys.readouterr().out.strip().splitlines()[-2:]
    said, *tokens = _printed(several)
    assert said.startswith("n1m2:sequence: ") and len(tokens) == 2
    assert tokens == truth


def _example(layout: str, ranks: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, EXAMPLE, "--layout", layout]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def _printed(process: subprocess.Popen[str]) -> list[str]:
    """The parameters of the first rank, and two rows of tokens."""
    with process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    return out.strip().splitlines()[-3:]
