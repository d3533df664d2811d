"""The decisive test: config.json and the names of weights, read by us, make the function that transformers computes."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hf_variants import PLAIN, VARIANTS, Variant, build, whole
from safetensors.torch import load_file
from torch import Tensor

from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.models.config import read_spec
from headgrid.models.names import check_left_over, sources
from headgrid.reference import Reference, relative_error
from headgrid.spec.model import ModelSpec
from headgrid.spec.rope import RopeScaling

SEQ = 33
"""Longer than every window."""
EXACT = 1e-5
"""Bound in fp64: transformers computes rotary angles, RMS norms and softmax in fp32 whatever the weights are."""
NOTICED = 1e-4
EPS = {"norm_eps": 0.3}
CHANGES: dict[str, tuple[dict[str, object], ...]] = {
    "llama": ({"rope_theta": 700.0}, {"activation": "gelu"}, {"attention_scale": 0.25}, {"is_causal": False}, EPS),
    "mistral": ({"sliding_window": 4}, {"sliding_window": 6}, {"sliding_window": 0}, {"full_attention_layers": (1,)}),
    "qwen2": ({"linear_bias": ()}, {"rope_theta": 700.0}, EPS),
    "qwen3": ({"qk_norm": False}, {"rope_theta": 700.0}, EPS),
    "gemma2": (
        *({"attn_logit_softcapping": 0.0}, {"attn_logit_softcapping": 4.0}, {"final_logit_softcapping": 0.0}),
        *({"attention_scale": None}, {"embedding_scale": 1.0}, {"norm_unit_offset": False}, {"activation": "gelu"}),
        *({"full_attention_layers": ()}, {"full_attention_layers": (0, 2)}, {"sliding_window": 4}),
    ),
    "gemma3_text": (
        *({"local_rope_theta": 0.0}, {"local_rope_theta": 60.0}, {"rope_theta": 700.0}, {"qk_norm": False}),
        *({"full_attention_layers": ()}, {"full_attention_layers": (0, 2)}, {"sliding_window": 6}),
        *({"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, {"norm_unit_offset": False}),
    ),
    "gpt2": ({"activation": "relu"}, {"attention_scale": 0.25}, {"linear_bias": ()}, EPS),
    "bert": ({"token_types": 0}, {"positions": "rotary"}, {"embedding_norm": False}, {"activation": "relu"}, EPS),
}
"""Fields of the plain variant's spec, each of which must move the logits."""


@dataclass(frozen=True)
class Loaded:
    """A model of transformers saved and read back by us, with what transformers makes of `tokens`."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    tokens: Tensor
    expected: Tensor

    def error(self, spec: ModelSpec) -> float:
        ours = Reference(spec, self.weights.__getitem__, torch.float64)
        with torch.no_grad():
            return relative_error(ours.logits(self.tokens, SEQ), self.expected)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    return lru_cache(maxsize=None)(lambda variant: loaded(variant, tmp_path_factory.mktemp("model")))


@torch.no_grad()
def loaded(variant: Variant, folder: Path) -> Loaded:
    model = build(variant)
    model.save_pretrained(folder)
    found = read_spec(folder)
    assert found.family == variant.family
    stored, shards = load_file(folder / "model.safetensors"), parameters(found.spec, Layout(), 0)
    where = sources(found.spec, found.family, stored)
    check_left_over(found.family, where, stored)
    tensors = {name: whole(stored, where[name], shard.shape[0]) for name, shard in shards.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: s.shape for n, s in shards.items()}
    tokens = torch.randint(0, found.spec.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1))
    result = model.double()(tokens)
    return Loaded(found.spec, tensors, tokens, result.logits if "logits" in result else result.last_hidden_state)


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.title)
each_plain = pytest.mark.parametrize("variant", PLAIN, ids=lambda variant: variant.title)


@each_variant
def test_logits_are_those_of_transformers(load, variant: Variant) -> None:
    model = load(variant)
    assert model.error(model.spec) <= EXACT


@each_plain
def test_another_field_is_noticed(load, variant: Variant) -> None:
    model = load(variant)
    for change in CHANGES[variant.family]:
        assert model.error(replace(model.spec, **change)) > NOTICED, change


@each_plain
def test_swapped_keys_and_values_are_noticed(load, variant: Variant) -> None:
    model = load(variant)
    names = [f"layers.1.attention.{part}.weight" for part in "kv"]
    swapped = dict(zip(names, (model.weights[name] for name in names[::-1]), strict=True))
    assert replace(model, weights=model.weights | swapped).error(model.spec) > NOTICED
