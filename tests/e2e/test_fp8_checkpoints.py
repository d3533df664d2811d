"""FP8 linears of a checkpoint: loaded, sharded, generated from and verified; what cannot be had is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from transformers import LlamaForCausalLM

import headgrid
from headgrid.errors import InvalidInput
from headgrid.models.model import Model, load
from headgrid.reference import Reference, relative_error

IDS = [[1, 2, 3, 40, 50, 6, 7], [4, 5, 90, 3, 3, 2, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    tiny_llama.write(found, vocab_size=150)
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, "tp1:fp8")


def _logits(model: Model, dtype: torch.dtype, *, fp8_linears: bool = False) -> torch.Tensor:
    return Reference(model.spec, model.pretrained.whole, dtype, fp8_linears=fp8_linears).logits(torch.tensor(IDS), 7)


def test_it_computes_what_the_reference_with_fp8_linears_does(model: Model) -> None:
    found = torch.stack(model.logits(IDS))
    exact, rounded = _logits(model, torch.float64), _logits(model, torch.float32, fp8_linears=True)
    error, floor = relative_error(found, exact), relative_error(rounded, exact)
    assert error < 1.5 * floor
    assert error > 1000 * relative_error(_logits(model, torch.float32), exact)
    assert relative_error(found, rounded) < 0.2 * floor, "one device has whole tokens, so hardly a number differs"


def test_it_generates_and_does_not_save(model: Model, tmp_path: Path) -> None:
    assert [len(row) for row in model.generate(IDS, 5).tokens] == [5, 5]
    with pytest.raises(InvalidInput, match="rounded to FP8"):
        model.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_model_of_transformers_is_sharded_with_it(folder: Path, model: Model) -> None:
    whole, read = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    ids, expected = torch.tensor(IDS), torch.stack(model.logits(IDS))
    for sharded in (headgrid.shard(whole, "tp1:fp8"), headgrid.shard(read, "tp1:fp8", checkpoint=folder)):
        assert relative_error(sharded(ids).logits, expected) < 1e-5
    kinds = {parameter.dtype for parameter in whole.parameters()}
    assert kinds == {torch.float32, torch.float8_e4m3fn}


def test_verify_states_both_floors(folder: Path, tmp_path: Path) -> None:
    ids = ";".join(",".join(map(str, row)) for row in IDS)
    options = ("--model", str(folder), "--layout", "n1m2:batch+gathered+fp8", "--ids", ids, "--json")
    command = [sys.executable, "-m", "headgrid", "verify", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["verdict"] == "verified"
    assert answer["memory_as_predicted"]
    assert answer["collectives_as_predicted"]
    assert answer["floor"] > 1000 * answer["unquantised_floor"]
    assert answer["relative_error"] > 0.5 * answer["floor"]
