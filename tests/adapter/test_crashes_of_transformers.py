"""transformers' own tensor parallelism fails where ranks do not divide heads (its issue #48307); sharded models do not.

The crash is asserted, so that these tests say when it is gone: then they are skipped, with what was found.
"""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from adapter_judge import disagreements
from adapter_models import build
from adapter_scenarios import SCENARIOS

RANKS = 4
EVEN = {"vocab_size": 128, "intermediate_size": 96, "head_dim": 16}  # so that heads are all that does not divide
MODELS: dict[str, tuple[int, int, str]] = {
    "2 KV heads": (4, 2, "n2m2:batch"),
    "1 KV head": (4, 1, "n1m4:sequence"),
    "6 heads": (6, 2, "n2m2:scores"),
    "4 KV heads": (4, 4, "n4m1"),
}
"""Heads, KV heads and the layout that runs them; the last one transformers can cut as well."""
FINE = "4 KV heads"
Found = Callable[[str], tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def changes(name: str) -> dict[str, Any]:
    heads, kv_heads, _ = MODELS[name]
    return EVEN | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads}


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank finds with transformers alone, and sharded; all in one launch."""
    root = tmp_path_factory.mktemp("models")
    alone, ours = [], []
    for name, (*_, layout) in MODELS.items():
        build("llama", **changes(name)).save_pretrained(root / name)
        alone.append(("tensor_parallel", {"folder": str(root / name)}))
        ours.append(("sharded", {"folder": str(root / name), "layout": layout}))
    results = launch(RANKS, ours + alone)
    sharded, tensor_parallel = results[: len(ours)], results[len(ours) :]
    return dict(zip(MODELS, zip(tensor_parallel, sharded, strict=True), strict=True)).__getitem__


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_gives_what_one_process_gives(name: str, found: Found) -> None:
    whole = build("llama", **changes(name))
    for rank in found(name)[1]:
        assert "error" not in rank, rank["error"]
        for scenario in ("logits", "greedy"):
            assert disagreements(rank[scenario], SCENARIOS[scenario](whole)) == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != FINE])
def test_transformers_alone_crashes(name: str, found: Found) -> None:
    pytest.importorskip("accelerate", reason="transformers' tensor parallelism needs accelerate")
    ranks, truth = found(name)[0], SCENARIOS["logits"](build("llama", **changes(name)))
    if not any("error" in rank for rank in ranks):
        wrong = [disagreements(rank, truth) for rank in ranks]
        how = f"its logits are wrong: {wrong}" if any(wrong) else "its logits are right"
        pytest.skip(f"transformers {transformers.__version__} now runs {name} on {RANKS} ranks, and {how}")
    for rank in ranks:
        assert rank["error"].startswith(("RuntimeError", "ValueError")), rank["error"]
        assert "is invalid for input of size" in rank["error"]


def test_transformers_alone_runs_heads_that_divide(found: Found) -> None:
    """The control: it is the heads that make it crash, not how it is called here."""
    pytest.importorskip("accelerate", reason="transformers' tensor parallelism needs accelerate")
    truth = SCENARIOS["logits"](build("llama", **changes(FINE)))
    for rank in found(FINE)[0]:
        assert disagreements(rank, truth) == []
