"""Rotary frequencies of a config against transformers' own functions, and what is refused about them."""

from collections.abc import Mapping

import pytest
import torch
from hf_variants import FULL, SCALINGS, SLIDING, YARN
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headgrid.errors import InvalidInput
from headgrid.models.config import spec_from_config
from headgrid.spec.model import ModelSpec

EXACT, NOTICED = 1e-6, 1e-3
SIZES = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 131_072}
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_31 |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6}
REAL = {
    "llama3.1": LLAMA_31,
    "llama3.2": LLAMA_31 | {"factor": 32.0},
    "qwen-yarn": QWEN_YARN,
    "deepseek-yarn": QWEN_YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5, "beta_slow": 2},
    "gpt-oss-yarn": QWEN_YARN | {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "no-factor-but-mscale": QWEN_YARN | {"factor": None, "mscale": 1.2, "mscale_all_dim": 0.3},
    "zeros-are-defaults": QWEN_YARN | {"beta_fast": 0, "beta_slow": None, "mscale": 0.0, "mscale_all_dim": 1.0},
    "less-than-one": QWEN_YARN | {"factor": 0.5},
    "linear-8": {"rope_type": "linear", "factor": 8, "rope_theta": 10_000},
}
EVERY = {**{f"tiny-{name}": values for name, values in SCALINGS.items()}, **REAL}


def ours(values: Mapping[str, object]) -> ModelSpec:
    return spec_from_config({**SIZES, "rope_parameters": dict(values)}, "x")


def theirs(values: Mapping[str, object]) -> tuple[torch.Tensor, float]:
    options = {key: value for key, value in SIZES.items() if key != "model_type"}
    return ROPE_INIT_FUNCTIONS[str(values["rope_type"])](LlamaConfig(**options, rope_parameters=dict(values)), "cpu")


def distance(values: Mapping[str, object], expected: tuple[torch.Tensor, float]) -> float:
    """The largest relative error of a frequency or of the amplitude."""
    rope = ours(values).rope(0)
    frequencies = torch.tensor(rope.frequencies(), dtype=torch.float64)
    errors = (frequencies - expected[0].double()).abs() / expected[0].double()
    return max(errors.max().item(), abs(rope.amplitude / expected[1] - 1))


@pytest.mark.parametrize("name", EVERY)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    # transformers mixes in fp32, where what is left of an unstretched frequency is rounded before it is added
    bound = max(EXACT, 1e-7 * float(str(EVERY[name].get("factor") or 1)))
    assert distance(EVERY[name], theirs(EVERY[name])) < bound


@pytest.mark.parametrize("name", EVERY)
def test_another_number_is_noticed(name: str) -> None:
    values, expected = EVERY[name], theirs(EVERY[name])
    assert distance({"rope_type": "default", "rope_theta": values["rope_theta"]}, expected) > NOTICED
    assert distance(values | {"rope_theta": 1.1 * float(str(values["rope_theta"]))}, expected) > NOTICED
    if values.get("factor"):
        assert distance(values | {"factor": 1.1 * float(str(values["factor"]))}, expected) > NOTICED


@pytest.mark.parametrize(
    "change",
    [
        *({"attention_factor": 0.9}, {"mscale": 2.0, "mscale_all_dim": 0.5}, {"beta_fast": 5.0}, {"beta_slow": 4.0}),
        *({"truncate": False}, {"original_max_position_embeddings": 9000}),
    ],
)
def test_every_option_of_yarn_is_noticed(change: dict[str, object]) -> None:
    assert distance(QWEN_YARN | change, theirs(QWEN_YARN)) > NOTICED
    assert distance(QWEN_YARN | change, theirs(QWEN_YARN | change)) < EXACT


def test_rotary_positions_of_gemma_3_are_those_of_transformers() -> None:
    rope = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}
    spec = spec_from_config({"model_type": "gemma3_text", "rope_parameters": rope}, "x")
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](Gemma3TextConfig(rope_parameters=rope), "cpu", layer_type=FULL)
    full, local = (torch.tensor(spec.rope(layer).frequencies()) for layer in (5, 0))
    torch.testing.assert_close(full, expected, rtol=EXACT, atol=0)
    torch.testing.assert_close(local, 1e4 ** -(torch.arange(0, 256, 2) / 256), rtol=EXACT, atol=0)
    assert not torch.allclose(full, local, rtol=NOTICED)


def test_the_two_spellings_may_agree() -> None:
    values = {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 77}
    both = {"rope_theta": 77.0, "rope_scaling": values, "rope_parameters": values}
    assert spec_from_config(SIZES | both, "x") == ours({"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0})


DEFAULT = {"rope_type": "default"}
REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "dynamic": ("dynamic", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "longrope": ("longrope", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
    "su": ("su", {"rope_scaling": {"type": "su"}}),
    "mrope": ("mrope", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
    "proportional": ("proportional", {"rope_parameters": {"rope_type": "proportional"}}),
    "a list": ("rope_scaling", {"rope_scaling": ["linear", 2.0]}),
    "a word": ("rope_parameters", {"rope_parameters": "linear"}),
    "kind is a list": ("rope_type", {"rope_parameters": {"rope_type": ["linear"]}}),
    "two kinds": ("rope_type", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}),
    "no factor": ("factor", {"rope_scaling": {"type": "linear"}}),
    "factor 0": ("factor", {"rope_scaling": {"type": "linear", "factor": 0}}),
    "negative factor": ("factor", {"rope_scaling": {"type": "linear", "factor": -2.0}}),
    "factor true": ("factor", {"rope_scaling": {"type": "linear", "factor": True}}),
    "factor is text": ("factor", {"rope_scaling": {"type": "linear", "factor": "2"}}),
    "factor too large": ("factor", {"rope_scaling": {"type": "linear", "factor": 1e300}}),
    "unknown key": ("finetuned", {"rope_parameters": YARN | {"finetuned": True}}),
    "a key of another kind": ("beta_fast", {"rope_parameters": LLAMA_31 | {"beta_fast": 3.0}}),
    "scaled default": ("factor", {"rope_parameters": DEFAULT | {"factor": 2.0}}),
    "llama3 without low": ("low_freq_factor", {"rope_parameters": LLAMA_31 | {"low_freq_factor": None}}),
    "llama3 low above high": ("low_factor", {"rope_parameters": LLAMA_31 | {"low_freq_factor": 5.0}}),
    "original 0": ("original_max", {"rope_parameters": YARN | {"original_max_position_embeddings": 0}}),
    "original is real": ("original_max", {"rope_parameters": YARN | {"original_max_position_embeddings": 8192.0}}),
    "beta false": ("beta_fast", {"rope_parameters": YARN | {"beta_fast": False}}),
    "negative mscale": ("mscale", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": -10.0}}),
    "attention_factor 0": ("attention_factor", {"rope_parameters": YARN | {"attention_factor": 0.0}}),
    "truncate 1": ("truncate", {"rope_parameters": YARN | {"truncate": 1}}),
    "theta 1": ("rope_theta", {"rope_theta": 1}),
    "theta true": ("rope_theta", {"rope_theta": True}),
    "theta in the object": ("rope_theta", {"rope_parameters": {"rope_theta": "10000"}}),
    "two thetas": ("rope_theta", {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 500_000.0}}),
    "two spellings": ("contradict", {"rope_scaling": YARN, "rope_parameters": DEFAULT}),
    "partly turned": ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    "partly turned inside": ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "by kind of layer": (FULL, {"rope_parameters": {FULL: DEFAULT, SLIDING: DEFAULT}}),
    "gemma: flat": ("rope_type", {"model_type": "gemma3_text", "rope_parameters": DEFAULT}),
    "gemma: both": ("both", {"model_type": "gemma3_text", "rope_parameters": {FULL: DEFAULT}, "rope_scaling": YARN}),
    "gemma: old key": ("type", {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "gemma: scaled windows": (
        "stretched",
        {"model_type": "gemma3_text", "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
    ),
    "gemma: not truncated": (
        "truncate",
        {"model_type": "gemma3_text", "rope_parameters": {FULL: YARN | {"truncate": False}}},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    word, change = REFUSED[name]
    with pytest.raises(InvalidInput) as caught:
        spec_from_config({"model_type": "llama", **change}, "x")
    assert word in caught.value.block()
