"""generate, verify and compare on a checkpoint as a user runs them: real processes, ranks and files of transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM

from headgrid.models.model import load
from headgrid.runtime.sampling import Sampling

NEW = 24
PROMPTS = ([1, 2, 3, 40, 50, 6, 7], [4, 5])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A tiny Llama, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama.write(folder, vocab_size=300)
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return model, folder


def headgrid(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headgrid", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


def ids(prompts: tuple[list[int], ...] = PROMPTS) -> str:
    return ";".join(",".join(map(str, prompt)) for prompt in prompts)


def greedy(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return found[0, len(prompt) :].tolist()  # type: ignore[index]


def answer(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["n1m3:batch", "n2m2pp2:sequence"])
def test_generate_gives_the_tokens_of_transformers(
    layout: str, reference: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    model, folder = reference
    options = ("--layout", layout, "--ids", ids(), "--max-new-tokens", NEW, "--json")
    found = answer(headgrid("generate", "--model", folder, *map(str, options), cwd=tmp_path))
    assert found["tokens"] == [greedy(model, prompt) for prompt in PROMPTS]
    assert found["tokens"] != [greedy(model, prompt) for prompt in reversed(PROMPTS)]
    assert found["text"] == [" ".join(f"w{token}" for token in tokens) for tokens in found["tokens"]]
    assert 0 < found["ttft_s"] < found["end_to_end_s"]
    steps = found["end_to_end_s"] - found["ttft_s"]
    assert found["decode_tokens_per_s"] == pytest.approx(2 * (NEW - 1) / steps)
    assert found["tpot_s"] == pytest.approx(steps / (NEW - 1))


def test_generate_takes_text_and_a_seed(reference: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    """And draws on four ranks what one process draws with the same seed."""
    _, folder = reference
    text = ("--prompt", "w4 w5", "--prompt", "w1 w2 w3", "--max-new-tokens", "12")
    drawing = ("--temperature", "1.3", "--top-k", "40", "--seed", "7", "--json")
    found = answer(headgrid("generate", "--model", folder, "--ranks", "4", *text, *drawing, cwd=tmp_path))
    alone = load(folder)
    same, other = (
        alone.generate([[4, 5], [1, 2, 3]], 12, sampling=Sampling(temperature=1.3, top_k=40, seed=seed)).tokens
        for seed in (7, 8)
    )
    assert found["tokens"] == same != other


def test_verify_tells_an_exact_layout_from_another_function(
    reference: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    _, folder = reference
    options = ("--dtype", "fp32", "--ids", ids(), "--json")
    exact = answer(headgrid("verify", "--model", folder, "--layout", "n2m2:scores", *options, cwd=tmp_path))
    assert exact["verdict"] == "verified"
    assert 0 < exact["relative_error"] <= exact["bound"] < 1e-4
    assert exact["collectives_as_predicted"]
    assert exact["sensitive"]
    assert len(exact["per_layer"]) == 2
    assert len(exact["memory_per_rank"]) == 4
    wrong = headgrid("verify", "--model", folder, "--layout", "n1m2:independent", *options, cwd=tmp_path)
    assert wrong.returncode == 74
    assert json.loads(wrong.stdout.splitlines()[-1])["verdict"] == "failed"
    assert "not verified" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_compare_runs_a_checkpoint(reference: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    _, folder = reference
    sizes = ("--batch", "4", "--seq", "16", "--decode-steps", "8", "--blocks", "1", "--device", "cpu")
    arms = ("--ranks", "4", "--arms", "tp2pp2,n2m2:batch")
    found = answer(
        headgrid("compare", "--model", folder, *arms, *sizes, "--block-seconds", "0", "--json", cwd=tmp_path)
    )
    assert [arm["verified"] for arm in found["arms"]] == [True] * 4
    assert found["negative_control_rejected"]
    design = json.loads(next(tmp_path.glob("runs/*/design.json")).read_text())
    assert design["checkpoint"] == str(folder)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("generate", ("--ids", "1,999"), ("token id 999", "0 to 299")),
        ("generate", ("--ids", "1,x"), ("not token ids", '--ids "1,2,3;4,5"')),
        ("generate", (), ("give prompts or token ids",)),
        ("generate", ("--ids", "1", "--max-new-tokens", "500"), ("128 positions", "--max-new-tokens 128")),
        ("generate", ("--ids", "1", "--top-p", "0"), ("top_p",)),
        ("generate", ("--ids", "1", "--layout", "tp4"), ("4 head groups cannot share 2 KV heads", "n2m2:batch")),
        ("generate", ("--ids", "1", "--layout", "tp2", "--ranks", "3"), ("--ranks: 3", "--layout: 2")),
        ("verify", ("--dtype", "int8"), ("int8", "bfloat16")),
        ("verify", ("--dtype", "fp64"), ("float64",)),
        ("verify", ("--device", "tpu"), ("tpu", "cpu")),
        ("generate", ("--ids", "1", "--model", "nowhere"), ("no folder 'nowhere'",)),
        ("verify", ("--model", "nowhere"), ("no folder 'nowhere'",)),
        ("compare", ("--model", "nowhere"), ("nowhere", "seed-small")),
    ],
)
def test_wrong_input_is_refused_before_a_rank_starts(
    command: str,
    options: tuple[str, ...],
    said: tuple[str, ...],
    reference: tuple[LlamaForCausalLM, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from headgrid.cli import main
    from headgrid.runtime import launch

    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("a rank was started"))
    monkeypatch.setattr(sys, "argv", ["headgrid", command, "--model", str(reference[1]), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 64
    error = capsys.readouterr().err
    assert all(text in error for text in said), error
