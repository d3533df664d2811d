"""Loading by slices: every rank of every layout gets exactly its part, and all together read each byte once.

What is loaded is compared with what the safetensors library reads, cut index by index.
"""

import itertools
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    FAMILIES,
    LAYOUTS,
    TORCH,
    Loaded,
    Opened,
    allocated,
    load_everywhere,
    named,
    opened,
    part_of,
    run_ranks,
    save_tiny,
    stored,
)
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import legal_layouts
from headgrid.layout.shards import parameters
from headgrid.models import safetensors as reading
from headgrid.models.names import Source
from headgrid.models.stream import load, whole
from headgrid.spec.model import ModelSpec

MANY = 97  # bytes: so few that every matrix is cut into many chunks, by rows
Truth = tuple[Path, ModelSpec, dict[str, Tensor]]
CASES = [(name, text) for name, texts in LAYOUTS.items() for text in texts]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    """A family's folder, model, and all its tensors by their global names, whole."""
    made: dict[str, Truth] = {}

    def make(name: str) -> Truth:
        if name not in made:
            folder = save_tiny(name, tmp_path_factory.mktemp(name))
            with opened(folder).checkpoint:
                model = opened(folder).model
            made[name] = folder, model, named(name.partition("-")[0], stored(folder), model)
        return made[name]

    return make


def wrong(truth: Truth, layout: Layout, ranks: list[Loaded], dtype: str = "float32") -> list[tuple[int, str]]:
    """Which tensors of which rank are not its parts of the whole ones, rounded."""
    _, model, tensors = truth
    return [
        (loaded.rank, name)
        for loaded in ranks
        for name, shard in parameters(model, layout, loaded.rank).items()
        if not torch.equal(loaded.views[name], part_of(tensors[name], shard).to(TORCH[dtype]))
    ]


def needed_bytes(folder: Path) -> int:
    """Bytes of the stored tensors that the model consists of."""
    source = opened(folder)
    with source.checkpoint as checkpoint:
        names = {each.name for each in source.sources.values()}
        return sum(checkpoint.tensors[name].num_bytes for name in names)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_rank_gets_its_part_and_each_byte_is_read_once(
    name: str, text: str, tiny: Callable[[str], Truth]
) -> None:
    truth, layout = tiny(name), parse_layout(text)
    ranks = load_everywhere(truth[0], layout)
    assert wrong(truth, layout, ranks) == []
    assert sum(loaded.bytes_read for loaded in ranks) == needed_bytes(truth[0])
    assert all(loaded.views for loaded in ranks)


def test_layouts_in_abundance(tiny: Callable[[str], Truth], budget: Callable[[int, int], int]) -> None:
    """Every layout that may run is loaded; by default a sample."""
    seen = 0
    for name in FAMILIES:
        truth = tiny(name)
        layouts = [layout for ranks in range(1, 9) for layout in legal_layouts(truth[1], ranks)]
        cuts = list({str(replace(lay, residual="replicated", residual_dtype="model")): lay for lay in layouts}.values())
        for layout in cuts[:: max(1, len(cuts) // budget(4, 1000))]:
            assert wrong(truth, layout, load_everywhere(truth[0], layout, stage_bytes=3000)) == [], (name, str(layout))
            seen += 1
    assert seen >= budget(20, 300)


@pytest.mark.parametrize("stage_bytes", [1, MANY, 5000, 1 << 30])
@pytest.mark.parametrize(
    ("name", "text"), [("llama", "n2m2:gather+concat"), ("gpt2", "n3m2:batch"), ("bert", "tp3dp2")]
)
def test_the_size_of_chunks_changes_nothing(
    name: str, text: str, stage_bytes: int, tiny: Callable[[str], Truth]
) -> None:
    truth, layout = tiny(name), parse_layout(text)
    ranks = load_everywhere(truth[0], layout, stage_bytes=stage_bytes)
    assert wrong(truth, layout, ranks) == []
    assert sum(loaded.bytes_read for loaded in ranks) == needed_bytes(truth[0])


@pytest.mark.parametrize("to", TORCH)
@pytest.mark.parametrize("of", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_rounded_to_every_other(of: str, to: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, of)
    model, layout = opened(folder).model, parse_layout("n2m2:batch")
    truth = folder, model, named("llama", stored(folder), model)
    assert {x.dtype for x in truth[2].values()} == {TORCH[of]}
    ranks = load_everywhere(folder, layout, to)
    assert {x.dtype for loaded in ranks for x in loaded.views.values()} == {TORCH[to]}
    assert wrong(truth, layout, ranks, to) == []


def write_in_order(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A file with the tensors one behind the other; the library itself would write wide dtypes first."""
    words = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    data = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors.values()]
    ends = list(itertools.accumulate(map(len, data), initial=0))
    header = {
        name: {"dtype": words[x.dtype], "shape": list(x.shape), "data_offsets": [ends[k], ends[k + 1]]}
        for k, (name, x) in enumerate(tensors.items())
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def test_a_checkpoint_may_mix_dtypes(tmp_path: Path) -> None:
    """Bytes of one dtype then begin where those of another cannot."""
    folder = save_tiny("llama", tmp_path)
    kinds = {0: torch.bfloat16, 1: torch.float32, 2: torch.float64}
    tensors = {name: x.to(kinds[k % 3], copy=True) for k, (name, x) in enumerate(stored(folder).items())}
    write_in_order(tensors, folder / "model.safetensors")
    assert all(torch.equal(x, tensors[name]) for name, x in stored(folder).items()), "the library reads it"
    model, layout = opened(folder).model, parse_layout("n1m3:gather")
    truth = folder, model, named("llama", stored(folder), model)
    for stage_bytes in (MANY, 300, 1 << 20):
        assert wrong(truth, layout, load_everywhere(folder, layout, stage_bytes=stage_bytes)) == []


def test_reads_may_come_in_pieces(tiny: Callable[[str], Truth], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may give less than was asked for, as it does behind 2 GB and on some file systems."""
    preadv, truth, layout = os.preadv, tiny("llama"), parse_layout("tp2")
    monkeypatch.setattr(reading.os, "preadv", lambda file, into, start: preadv(file, [into[0][:100]], start))
    assert wrong(truth, layout, load_everywhere(truth[0], layout)) == []


def test_a_disk_that_cannot_be_read_is_told(tiny: Callable[[str], Truth], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int, into: object, start: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading.os, "preadv", broken)
    with pytest.raises(InvalidInput) as raised:
        load_everywhere(tiny("llama")[0], parse_layout("tp2"))
    assert "Input/output error" in raised.value.block()


def test_files_with_an_index_are_one_stream(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model, layout = opened(folder).model, parse_layout("n2m2:batch")
    assert wrong((folder, model, named("qwen3", stored(folder), model)), layout, load_everywhere(folder, layout)) == []


def test_nobody_reads_what_nobody_needs(tmp_path: Path) -> None:
    """BERT's pooler, which is stored with it."""
    folder = save_tiny("bert", tmp_path)
    pooler = sum(x.numel() * 4 for name, x in stored(folder).items() if "pooler" in name)
    with opened(folder).checkpoint as checkpoint:
        assert pooler > 2000
        assert needed_bytes(folder) == checkpoint.num_bytes - pooler


@pytest.mark.parametrize("ranks", [(2, 3), (5,)])
def test_some_of_the_ranks_can_load_without_the_others(ranks: tuple[int, ...], tiny: Callable[[str], Truth]) -> None:
    """Those of one host, or one alone: they read no rows that none of them needs."""
    truth, layout = tiny("llama"), parse_layout("n2m3:batch")
    loaded = load_everywhere(truth[0], layout, ranks=ranks)
    assert tuple(each.rank for each in loaded) == ranks
    assert wrong(truth, layout, loaded) == []
    assert sum(each.bytes_read for each in loaded) < 0.8 * needed_bytes(truth[0])


def test_what_a_rank_sends_and_gets_at_once_is_bounded(tiny: Callable[[str], Truth]) -> None:
    """Whatever owners have in common: replicas get the same, and a vocabulary's rows go to one rank after the other."""
    truth = tiny("llama")
    for text in ("tp2", "tp2dp4", "dp6", "n2m2:batch"):
        for stage_bytes in (2000, 6000):
            ranks = load_everywhere(truth[0], parse_layout(text), stage_bytes=stage_bytes)
            assert max(each.largest for each in ranks) * 4 <= 1.1 * stage_bytes + 400, text
    control = load_everywhere(truth[0], parse_layout("dp6"), stage_bytes=1 << 20)
    assert max(each.largest for each in control) * 4 > 20_000


def test_progress_tells_the_bytes_done_and_ends_with_all(tiny: Callable[[str], Truth]) -> None:
    source, layout = opened(tiny("gpt2")[0]), parse_layout("tp3")

    def job(axis: object) -> list[tuple[int, int]]:
        views, _ = allocated(source.model, layout, axis.index, torch.float32)  # type: ignore[attr-defined]
        steps: list[tuple[int, int]] = []
        load(
            source.checkpoint,
            source.sources,
            source.model,
            layout,
            axis,
            views,
            lambda *s: steps.append(s),
            stage_bytes=2000,
        )  # type: ignore[arg-type]
        return steps

    for steps in run_ranks(range(3), job):
        assert len(steps) > 5
        assert [done for done, _ in steps] == sorted({done for done, _ in steps})
        assert steps[-1] == (needed_bytes(tiny("gpt2")[0]),) * 2
    source.checkpoint.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_tensors_are_read_alone(name: str, tiny: Callable[[str], Truth]) -> None:
    folder, model, tensors = tiny(name)
    source = opened(folder)
    with source.checkpoint as checkpoint:
        for each, shard in parameters(model, Layout(), 0).items():
            found = whole(checkpoint, source.sources, each, shard.shape)
            assert torch.equal(found, tensors[each]), each
            assert found.is_contiguous()
            assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_a_whole_tensor_of_another_shape_is_refused(tiny: Callable[[str], Truth]) -> None:
    for name, shape in (("llama", (36, 24)), ("llama", (35, 23)), ("gpt2", (97, 24)), ("gpt2", (96, 25))):
        source = opened(tiny(name)[0])
        with source.checkpoint as checkpoint, pytest.raises(InvalidInput, match="another shape"):
            whole(checkpoint, source.sources, "layers.0.mlp.up.weight", shape)


def test_a_single_number_is_no_matrix(tiny: Callable[[str], Truth]) -> None:
    source = opened(tiny("llama")[0])
    tensors = source.checkpoint.tensors
    tensors["lm_head.weight"] = replace(tensors["lm_head.weight"], shape=())
    with source.checkpoint as checkpoint, pytest.raises(InvalidInput, match="another shape"):
        whole(checkpoint, source.sources, "head.weight", (53, 24))


def shifted(source: Opened) -> Mapping[str, Source]:
    """All of the stored bytes are read one element too late."""
    tensors = source.checkpoint.tensors
    for name, tensor in list(tensors.items())[1:-1]:
        tensors[name] = replace(tensor, start_byte=tensor.start_byte + 4, stop_byte=tensor.stop_byte + 4)
    return source.sources


def swapped(first: str, second: str) -> Callable[[Opened], Mapping[str, Source]]:
    def swap(source: Opened) -> Mapping[str, Source]:
        names = {name: name.replace(first, "?").replace(second, first).replace("?", second) for name in source.sources}
        return {name: source.sources[other] for name, other in names.items()}

    return swap


def not_transposed(source: Opened) -> Mapping[str, Source]:
    """W_O of GPT-2 is square: it fits either way."""
    return {
        name: replace(each, transposed=each.transposed and ".o." not in name) for name, each in source.sources.items()
    }


SPOILT = {
    "bytes shifted": ("llama", shifted, ""),
    "K and V swapped": ("llama", swapped(".k.", ".v."), ".k."),
    "gate and up swapped": ("llama", swapped(".gate.", ".up."), ".up."),
    "layers swapped": ("llama", swapped("layers.0.", "layers.1."), "layers."),
    "embedding and head swapped": ("llama", swapped("embedding.", "head."), "embedding."),
    "fused Q and K swapped": ("gpt2", swapped(".q.", ".k."), ".q."),
    "fused K and V swapped": ("gpt2", swapped(".k.", ".v."), ".v."),
    "not transposed": ("gpt2", not_transposed, ".o."),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_read_from_the_wrong_place_is_noticed(kind: str, tiny: Callable[[str], Truth]) -> None:
    name, change, affected = SPOILT[kind]
    truth, layout = tiny(name), parse_layout("n1m2pp2:batch")
    found = wrong(truth, layout, load_everywhere(truth[0], layout, change=change))
    assert found
    assert any(affected in tensor for _, tensor in found)


def test_a_rank_must_give_exactly_what_it_owns(tiny: Callable[[str], Truth]) -> None:
    source, layout = opened(tiny("llama")[0]), parse_layout("tp2")

    def attempt(edit: Callable[[dict[str, Tensor]], object]) -> None:
        def job(axis: object) -> None:
            views, _ = allocated(source.model, layout, 0, torch.float32)
            edit(views)
            load(source.checkpoint, source.sources, source.model, layout, axis, views)  # type: ignore[arg-type]

        run_ranks((0,), job)

    attempt(lambda views: None)
    for edit in (
        lambda views: views.pop("final.norm.weight"),
        lambda views: views.update(more=torch.zeros(1)),
        lambda views: views.update({"final.norm.weight": torch.zeros(23)}),
        lambda views: views.update({"final.norm.weight": torch.zeros(24, dtype=torch.float16)}),
    ):
        with pytest.raises(ValueError):
            attempt(edit)
    source.checkpoint.close()


def test_a_model_that_the_checkpoint_is_not_is_refused_by_name(tiny: Callable[[str], Truth]) -> None:
    source = opened(tiny("llama")[0])
    other = replace(source.model, mlp_hidden_size=36)
    views, _ = allocated(other, Layout(), 0, torch.float32)
    with source.checkpoint as checkpoint, pytest.raises(InvalidInput) as raised:
        run_ranks((0,), lambda axis: load(checkpoint, source.sources, other, Layout(), axis, views))
    assert "stored [35, 24], by the config [36, 24]" in raised.value.block()


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    source = opened(folder)
    views, _ = allocated(source.model, Layout(), 0, torch.float32)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(20_000)
    with source.checkpoint as checkpoint, pytest.raises(InvalidInput, match="has become shorter"):
        run_ranks((0,), lambda axis: load(checkpoint, source.sources, source.model, Layout(), axis, views))
