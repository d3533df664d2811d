"""Every tensor of a model has its place in what transformers saves, and nothing else is there."""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import pytest
import torch
from hf_variants import GPT2, PLAIN, SIZES, VARIANTS, Variant, build, whole
from safetensors.torch import load_file
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.models.config import family_of, spec_from_config
from headgrid.models.names import Source, check_left_over, copies, ignorable, sources
from headgrid.spec.model import ModelSpec

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.title)
each_plain = pytest.mark.parametrize("variant", PLAIN, ids=lambda variant: variant.title)
PREFIXES = {"gpt2": "transformer.", "bert": "bert."}


def spec_of(variant: Variant) -> ModelSpec:
    return spec_from_config(variant.config().to_dict(), variant.title)


def saved(variant: Variant, folder: Path) -> dict[str, Tensor]:
    build(variant).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def uncovered(spec: ModelSpec, where: Mapping[str, Source], stored: Mapping[str, Tensor]) -> set[str]:
    """Stored tensors of which an element is not taken exactly once. Every cut must have the model's shape."""
    counts = {name: torch.zeros_like(tensor, dtype=torch.int32) for name, tensor in stored.items()}
    for name, shard in parameters(spec, Layout(), 0).items():
        part = whole(counts, where[name], shard.shape[0])
        assert tuple(part.shape) == shard.shape, name
        part += 1
    return {name for name, count in counts.items() if not bool((count == 1).all())}


@each_variant
def test_sources_cover_what_is_saved_exactly_once(variant: Variant, tmp_path: Path) -> None:
    spec, stored = spec_of(variant), saved(variant, tmp_path)
    where = sources(spec, family_of(variant.config().to_dict()), stored)
    assert list(where) == list(parameters(spec, Layout(), 0))
    assert uncovered(spec, where, stored) == set()
    check_left_over(variant.family, where, stored)
    assert copies(where, stored) == ()


def test_the_check_of_coverage_can_fail(tmp_path: Path) -> None:
    variant = next(variant for variant in PLAIN if variant.family == "gpt2")
    spec, stored = spec_of(variant), saved(variant, tmp_path)
    where = sources(spec, "gpt2", stored)
    key = "layers.1.attention.k.weight"
    wrong = where | {key: Source(where[key].name, True, where[key].first_row + 1)}
    assert uncovered(spec, wrong, stored) == {"transformer.h.1.attn.c_attn.weight"}


@each_plain
def test_both_prefixes_are_known(variant: Variant, tmp_path: Path) -> None:
    spec, stored, prefix = spec_of(variant), saved(variant, tmp_path), PREFIXES.get(variant.family, "model.")
    bare = {name.removeprefix(prefix) for name in stored}
    full = {name if name.startswith("lm_head") else prefix + name for name in bare}
    found = [sources(spec, variant.family, names) for names in (bare, full)]
    for where, names in zip(found, (bare, full), strict=True):
        assert {source.name for source in where.values()} == names
    with pytest.raises(InvalidInput, match="lacks"):
        sources(spec, variant.family, {f"other.{name}" for name in bare})


@each_plain
def test_each_missing_tensor_is_named(variant: Variant, tmp_path: Path) -> None:
    spec, stored = spec_of(variant), saved(variant, tmp_path)
    where = sources(spec, variant.family, stored)
    for source in {source.name for source in where.values()} - {where["embedding.weight"].name}:
        with pytest.raises(InvalidInput, match=f"lacks {source}$"):
            sources(spec, variant.family, stored.keys() - {source})


@each_plain
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "lm_head.bias", "score.weight", "h.0.attn.c_attn.weight_scale", ""]
)
def test_a_tensor_too_many_is_named(variant: Variant, name: str, tmp_path: Path) -> None:
    spec, stored = spec_of(variant), saved(variant, tmp_path)
    where = sources(spec, variant.family, stored)
    with pytest.raises(InvalidInput, match="holds") as caught:
        check_left_over(variant.family, where, {*stored, name})
    assert repr(name) in caught.value.what


IGNORABLE = {
    "llama": ["model.layers.3.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight"],
    "gpt2": ["h.0.attn.bias", "transformer.h.11.attn.masked_bias", "lm_head.weight"],
    "bert": [
        *("embeddings.position_ids", "bert.embeddings.position_ids", "pooler.dense.weight", "bert.pooler.dense.bias"),
        *("cls.predictions.decoder.weight", "cls.seq_relationship.bias", "cls.predictions.bias"),
    ],
}
NEEDED = ["h.0.attn.c_attn.bias", "embeddings.word_embeddings.weight", "model.norm.weight", "lm_head.weights"]


@pytest.mark.parametrize("family", IGNORABLE)
def test_buffers_and_unused_heads_are_ignorable(family: str) -> None:
    for name in IGNORABLE[family]:
        assert ignorable(family, name), name
        assert not ignorable(family, f"other.{name}"), name
    for name in [*NEEDED, *(each for other in IGNORABLE if other != family for each in IGNORABLE[other])]:
        assert name in IGNORABLE[family] or not ignorable(family, name), name


def test_norms_of_old_bert_checkpoints_have_other_names(tmp_path: Path) -> None:
    variant = next(variant for variant in PLAIN if variant.family == "bert")
    spec, stored = spec_of(variant), saved(variant, tmp_path)
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in stored}
    where = sources(spec, "bert", old)
    assert {source.name for source in where.values()} == old != set(stored)
    assert where["layers.2.mlp.norm.bias"] == Source("encoder.layer.2.output.LayerNorm.beta")


def _names(config: dict[str, object], **changes: object) -> tuple[ModelSpec, str]:
    full = config | changes
    return spec_from_config(full, "x"), family_of(full)


def test_places_by_hand() -> None:
    spec, family = _names({**GPT2, "model_type": "gpt2"})
    where = sources(spec, family, _gpt2_names(3))
    layer = "h.2.attn.c_attn"
    assert where["layers.2.attention.q.weight"] == Source(f"{layer}.weight", True, 0)
    assert where["layers.2.attention.k.weight"] == Source(f"{layer}.weight", True, 60)
    assert where["layers.2.attention.v.bias"] == Source(f"{layer}.bias", False, 120)
    assert where["layers.2.mlp.down.weight"] == Source("h.2.mlp.c_proj.weight", True)
    assert where["embedding.weight"] == Source("wte.weight") and where["final.norm.bias"] == Source("ln_f.bias")


def _gpt2_names(layers: int) -> set[str]:
    parts = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    found = {f"h.{layer}.{part}.{kind}" for layer in range(layers) for part in parts for kind in ("weight", "bias")}
    return found | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


def test_an_untied_head_must_be_there() -> None:
    names = _gpt2_names(3)
    untied, family = _names({**GPT2, "model_type": "gpt2"}, tie_word_embeddings=False)
    with pytest.raises(InvalidInput, match=r"lacks lm_head\.weight") as caught:
        sources(untied, family, names)
    assert "tie_word_embeddings" in caught.value.why
    assert sources(untied, family, {*names, "lm_head.weight"})["head.weight"] == Source("lm_head.weight")


def test_a_tied_head_may_be_stored_instead_or_twice() -> None:
    names, (tied, family) = _gpt2_names(3), _names({**GPT2, "model_type": "gpt2"})
    both = {*names, "lm_head.weight"}
    where = sources(tied, family, both)
    assert copies(where, both) == (("wte.weight", "lm_head.weight"),)
    check_left_over(family, where, both)
    head_only = both - {"wte.weight"}
    with pytest.raises(InvalidInput, match="lacks transformer"):  # nothing says which prefix: the usual one is named
        sources(tied, family, head_only)
    usual = {name if name == "lm_head.weight" else f"transformer.{name}" for name in head_only}
    where = sources(tied, family, usual)
    assert where["embedding.weight"] == Source("lm_head.weight") and copies(where, usual) == ()


def test_fewer_layers_than_stored_are_noticed() -> None:
    spec, family = _names({**GPT2, "model_type": "gpt2"}, n_layer=2)
    with pytest.raises(InvalidInput, match=r"h\.2\."):
        check_left_over(family, sources(spec, family, _gpt2_names(3)), _gpt2_names(3))


def test_far_fewer_layers_than_in_the_config_are_refused_at_once() -> None:
    sizes = {**SIZES, "model_type": "llama", "num_hidden_layers": 1024}
    start = perf_counter()
    with pytest.raises(InvalidInput, match=r"lacks model\.layers\.1023\."):
        sources(spec_from_config(sizes, "x"), "llama", ["model.embed_tokens.weight"])
    assert perf_counter() - start < 0.3
