"""Loading onto GPUs and saving from them, over NCCL: the same bits as on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LAYOUTS, TORCH, allocated, opened, run_ranks, save_tiny, stored
from loading_work import Run, Took

from headgrid.layout.layout import Layout
from headgrid.models.save import save
from headgrid.models.stream import load
from headgrid.runtime.launch import Job, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
PAIRS = ("tp2", "n1m2:gather+concat", "n1m2:batch", "pp2", "dp2")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_gpu_loads_and_saves(name: str, dtype: str, tmp_path: Path) -> None:
    origin = save_tiny(name, tmp_path / "origin", dtype)
    source = opened(origin)
    on_gpu, on_cpu = (allocated(source.model, Layout(), 0, TORCH[dtype], device)[0] for device in ("cuda", "cpu"))
    with source.checkpoint as checkpoint:
        for views in (on_gpu, on_cpu):
            run_ranks(
                (0,),
                lambda axis, v=views: load(
                    checkpoint, source.sources, source.model, Layout(), axis, v, stage_bytes=5000
                ),
            )
    assert all(torch.equal(on_gpu[key].cpu(), x) for key, x in on_cpu.items())
    where = tmp_path / "saved", origin, source.sources, source.model, Layout()
    run_ranks((0,), lambda axis: save(*where, axis, on_gpu, TORCH[dtype], stage_bytes=5000))
    original = stored(origin)
    assert all(torch.equal(original[key], x) for key, x in stored(tmp_path / "saved").items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs on this machine")
def test_two_gpus_over_nccl(tmp_path: Path) -> None:
    origin = save_tiny("llama", tmp_path / "origin", "bfloat16")
    like = Run("tp2", check=True, device="cuda", stage_bytes=5000)
    runs = [replace(like, layout=text, save_to=tmp_path / text) for text in PAIRS]
    payload = {"folder": str(origin), "runs": runs, "results": str(tmp_path)}
    run(Job("loading_work:measure", payload, 2, "nccl"), log_to=tmp_path / "logs")
    for rank in range(2):
        found: list[Took] = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert [each.wrong for each in found] == [()] * len(PAIRS)
    for text in PAIRS:
        saved = stored(tmp_path / text)
        assert all(torch.equal(x, saved[key]) for key, x in stored(origin).items()), text
