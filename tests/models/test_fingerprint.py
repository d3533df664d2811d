"""Checkpoints on several hosts: what one rank reads for another must come from the same files."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headgrid.errors import InvalidInput
from headgrid.models.pretrained import Pretrained
from headgrid.models.safetensors import open_checkpoint


def written(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def fingerprint(folder: Path) -> int:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.fingerprint()


def test_only_the_same_weights_have_the_same_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(300, 400), "b": torch.randn(7)}
    one = written(tmp_path / "one", weights)
    found = fingerprint(one)
    assert 0 <= found < 1 << 60 and found == fingerprint(shutil.copytree(one, tmp_path / "copy"))
    others = (
        {name: weight * 1.001 for name, weight in weights.items()},
        weights | {"b": torch.randn(7)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"].view(400, 300), "b": weights["b"]},
        {"a": weights["a"].half(), "b": weights["b"]},
    )
    prints = {fingerprint(written(tmp_path / f"other{n}", other)) for n, other in enumerate(others)}
    assert len(prints) == len(others) and found not in prints


class Ranks:
    """An axis of three ranks, seen from the first; the others have these fingerprints."""

    ranks, size, index = (0, 1, 2), 3, 0

    def __init__(self, others: list[int]) -> None:
        self.others = others

    def all_gather(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return torch.cat([x, torch.tensor(self.others)])


@pytest.mark.parametrize("others", [[5, 5], [5, 6]])
def test_different_checkpoints_are_refused_on_every_rank(others: list[int]) -> None:
    opened: Any = SimpleNamespace(checkpoint=SimpleNamespace(fingerprint=lambda: 5), folder=Path("model"))
    if others == [5, 5]:
        Pretrained._ensure_same(opened, Ranks(others), torch.device("cpu"))  # type: ignore[arg-type]
        return
    with pytest.raises(InvalidInput, match="different checkpoints in model") as caught:
        Pretrained._ensure_same(opened, Ranks(others), torch.device("cpu"))  # type: ignore[arg-type]
    assert caught.value.numbers == "ranks 2 have another than rank 0"
