"""Saving from shards: what another library reads is what was loaded, bit for bit, and nothing half-written stays."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_cases import LAYOUTS, TORCH, ThreadAxis, allocated, opened, run_ranks, save_tiny, stored
from torch import Tensor

from headgrid.errors import HeadgridError, InvalidInput, NotAvailable
from headgrid.layout.layout import Layout, parse_layout
from headgrid.models import save as saving
from headgrid.models.save import planned_files, save
from headgrid.models.stream import load

CASES = [(name, text) for name, texts in LAYOUTS.items() for text in texts[1:]]
UNUSED = {"bert": "pooler"}
"""What of a family's stored tensors is no part of the model."""
TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 8}',
    "merges.txt": "#version: 0.2\n",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder as transformers saves it, and a tokenizer's files in it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(f"{name}-origin"))
            for file, text in TOKENIZER.items():
                (made[name] / file).write_text(text)
        return made[name]

    return make


def resave(origin: Path, to: Path, layout: Layout, of: str = "float32", dtype: str = "", **how: Any) -> None:
    """Load in dtype `of` on every rank of the layout, and save from there, in `dtype` or the same."""

    def job(axis: ThreadAxis) -> None:
        source = opened(origin)
        with source.checkpoint as checkpoint:
            views, _ = allocated(source.model, layout, axis.index, TORCH[of])
            load(checkpoint, source.sources, source.model, layout, axis, views, stage_bytes=900)
        save(
            *(to, origin, source.sources, source.model, layout, axis, views, TORCH[dtype or of]), stage_bytes=900, **how
        )

    run_ranks(range(layout.ranks), job)


def save_ones(to: Path, origin: Path, layout: Layout, axis: ThreadAxis, *, companions: bool = True) -> None:
    """Save a model whose weights are all 1."""
    source = opened(origin)
    source.checkpoint.close()
    views, _ = allocated(source.model, layout, axis.ranks[axis.index], torch.float32)
    for x in views.values():
        x.fill_(1.0)
    where = origin if companions else None
    save(to, where, source.sources, source.model, layout, axis, views, torch.float32, stage_bytes=2000)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def kept(name: str, folder: Path) -> dict[str, Tensor]:
    """The stored tensors that the model consists of."""
    return {each: x for each, x in stored(folder).items() if UNUSED.get(name, "\0") not in each}


@pytest.mark.parametrize(("name", "text"), CASES)
def test_any_layout_saves_what_it_loaded(name: str, text: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    resave(folders(name), tmp_path / "saved", parse_layout(text))
    assert equal(stored(tmp_path / "saved"), kept(name, folders(name)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_transformers_reads_the_same_model(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    resave(folders(name), tmp_path / "saved", parse_layout("n1m2pp2:batch"))
    kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    outputs: list[Tensor] = []
    for folder in (folders(name), tmp_path / "saved"):
        model, told = kind.from_pretrained(folder, output_loading_info=True)
        assert {each for each in told["missing_keys"] if UNUSED.get(name, "\0") not in each} == set()
        assert not told["unexpected_keys"]
        with torch.no_grad():
            outputs.append(model.eval()(ids)[0])
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.1


def test_an_error_of_one_element_is_noticed(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """So the comparison above can fail."""
    saved = stored(folders("gpt2"))
    saved["transformer.h.1.attn.c_attn.weight"] = saved["transformer.h.1.attn.c_attn.weight"].roll(1)
    assert not equal(saved, stored(folders("gpt2")))
    assert not equal(
        {name: x.to(torch.float64) for name, x in stored(folders("gpt2")).items()}, stored(folders("gpt2"))
    )


@pytest.mark.parametrize("to", TORCH)
@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_weights_are_rounded_to_the_dtype_asked_for(of: str, to: str, tmp_path: Path) -> None:
    origin = save_tiny("llama", tmp_path / "origin", of)
    resave(origin, tmp_path / "saved", parse_layout("n2m2:batch"), of, to)
    expected = {name: x.to(TORCH[to]) for name, x in stored(origin).items()}
    assert equal(stored(tmp_path / "saved"), expected)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == to
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == TORCH[to]


def test_large_models_are_saved_in_several_files_with_an_index(folders: Callable[[str], Path], tmp_path: Path) -> None:
    resave(folders("llama"), tmp_path / "saved", parse_layout("n2m2:batch"), max_shard_bytes=9000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{k + 1:05}-of-{len(files):05}.safetensors" for k in range(len(files))]
    for file in files:
        tensors = safetensors.torch.load_file(tmp_path / "saved" / file)
        assert len(tensors) == 1 or sum(4 * x.numel() for x in tensors.values()) <= 9000
    assert equal(stored(tmp_path / "saved"), stored(folders("llama")))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.numel() for x in stored(folders("llama")).values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert equal(dict(model.state_dict()), stored(folders("llama")))
    resave(tmp_path / "saved", tmp_path / "again", parse_layout("tp2"))
    assert equal(stored(tmp_path / "again"), stored(folders("llama"))), "we read it too"


def test_the_same_bytes_come_from_every_layout(folders: Callable[[str], Path], tmp_path: Path) -> None:
    hashes = set()
    for text in ("tp1", "n2m2:gather+concat", "tp2pp2dp2"):
        resave(folders("qwen3"), tmp_path / text, parse_layout(text))
        hashes.add(hashlib.sha256((tmp_path / text / "model.safetensors").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_what_the_library_says_of_the_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    resave(folders("llama"), tmp_path / "saved", Layout())
    with safetensors.safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "saved" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0, "tensors are aligned"


def test_the_config_and_the_tokenizer_come_along(folders: Callable[[str], Path], tmp_path: Path) -> None:
    resave(folders("llama"), tmp_path / "saved", parse_layout("tp2"))
    for file, text in TOKENIZER.items():
        assert (tmp_path / "saved" / file).read_text() == text
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / file).read_text()) == json.loads((folders("llama") / file).read_text())
    resave(folders("llama"), tmp_path / "other", parse_layout("tp2"), dtype="bfloat16")
    config = json.loads((folders("llama") / "config.json").read_text())
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == config | {"dtype": "bfloat16"}


def test_an_empty_folder_is_used_and_one_in_use_is_not(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    resave(folders("llama"), tmp_path / "empty", parse_layout("tp2"))
    before = stored(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("empty", "file", "full"):
        with pytest.raises(HeadgridError) as raised:
            resave(folders("llama"), tmp_path / name, parse_layout("tp2"))
        assert isinstance(raised.value, InvalidInput | NotAvailable)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert equal(before, stored(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def outcomes(origin: Path, to: Path, layout: Layout, alter: Callable[[ThreadAxis], object] = id) -> list[str]:
    """The block of what each rank raises; empty for one that saves."""
    found = [""] * layout.ranks

    def job(axis: ThreadAxis) -> None:
        alter(axis)
        try:
            save_ones(to, origin, layout, axis)
        except HeadgridError as error:
            found[axis.index] = error.block()

    run_ranks(range(layout.ranks), job)
    return found


def test_every_rank_learns_that_one_cannot_prepare(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = outcomes(folders("llama"), tmp_path / "file", parse_layout("tp2pp2"))
    assert "is in use" in told[0]
    assert all("another rank" in block for block in told[1:])


def test_too_small_a_disk_is_told_before_anything_is_written(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    told = outcomes(folders("llama"), tmp_path / "saved", parse_layout("tp2"))
    assert "too small" in told[0]
    assert "0.000 GB are free" in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fills_up_leaves_nothing_and_holds_nobody(
    failing: int, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, pwrite = parse_layout("n2m2:batch"), os.pwrite
    count = iter(range(1000))
    culprit: list[int] = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        """The third write of the job fails, and all later ones of that thread."""
        thread = threading.get_ident()
        if next(count) == 2 + failing:
            culprit.append(thread)
        if thread in culprit:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(saving.os, "pwrite", full)
    told = outcomes(folders("llama"), tmp_path / "saved", layout)
    assert sum("No space left on device" in block for block in told) == 1
    assert sum("another rank" in block for block in told) == 3
    assert list(tmp_path.iterdir()) == []


class Stop(BaseException):
    """As Ctrl-C, or anything else."""


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_interrupted_never_has_the_name(rank: int, folders: Callable[[str], Path], tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def stopping(axis: ThreadAxis) -> None:
        met, count = axis._met, iter(range(100))

        def meet(mine: Any) -> Any:
            if next(count) == 6:
                seen.append(sorted(path.name for path in tmp_path.iterdir()))
                if axis.index == rank:
                    raise Stop
            return met(mine)

        axis._met = meet  # type: ignore[method-assign]

    with pytest.raises(Stop):
        outcomes(folders("llama"), tmp_path / "saved", parse_layout("n2m2:batch"), stopping)
    assert [".saved.part"] in seen
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_replaced(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / ".saved.part").mkdir()
    (tmp_path / ".saved.part" / "model.safetensors").write_text("half")
    resave(folders("llama"), tmp_path / "saved", parse_layout("tp2"))
    assert equal(stored(tmp_path / "saved"), stored(folders("llama")))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / ".saved.part").symlink_to("precious")
    resave(folders("llama"), tmp_path / "saved", Layout())
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "saved"]


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


HOSTILE: Mapping[str, Callable[[Path], object]] = {
    "a tokenizer linked out": lambda folder: (folder / "vocab.txt").symlink_to("/etc/passwd"),
    "a tokenizer that is a FIFO": lambda folder: os.mkfifo(folder / "vocab.txt"),
    "a tokenizer of a terabyte": lambda folder: huge(folder / "vocab.txt"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_odd_in_the_origin_is_not_copied(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(folders("llama"), origin)
    to = tmp_path / "saved"
    HOSTILE[kind](origin)
    with pytest.raises(InvalidInput):
        run_ranks((0,), lambda axis: save_ones(to, origin, Layout(), axis))
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_a_model_without_an_origin_is_saved_without_a_config(folders: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks((0,), lambda axis: save_ones(tmp_path / "saved", folders("llama"), Layout(), axis, companions=False))
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["model.safetensors"]
    found = stored(tmp_path / "saved")
    assert {name: x.shape for name, x in found.items()} == {n: x.shape for n, x in stored(folders("llama")).items()}
    assert all(x.eq(1).all() for x in found.values())


def test_all_ranks_are_needed(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all 2 of the layout"):
        run_ranks((1,), lambda axis: save_ones(tmp_path / "s", folders("llama"), parse_layout("tp2"), axis))


def test_files_are_cut_at_tensors() -> None:
    shapes = {"a": (10, 10), "b": (10,), "c": (200,), "d": (5,), "e": (5,)}
    files = planned_files(shapes, torch.float16, 240)
    assert [[tensor.name for tensor in file.tensors] for file in files] == [["a", "b"], ["c"], ["d", "e"]]
    assert [file.name for file in files] == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert files[0].tensors[1].stop_byte == files[0].num_bytes == len(files[0].header) + 220
    assert [file.name for file in planned_files(shapes, torch.float16, 1000)] == ["model.safetensors"]
    with pytest.raises(InvalidInput, match="not saved as"):
        planned_files(shapes, torch.int8, 240)
