"""config.json: what transformers writes is read as transformers reads it, in both spellings."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hf_variants import CLASSES, FAMILIES_TESTED, FULL, SIZES, SLIDING, VARIANTS, Variant, old_spelling, write_config

from headgrid.errors import InvalidInput
from headgrid.models.config import checkpoint_dtype, family_of, read_spec, spec_from_config, stop_tokens
from headgrid.models.families import DEFAULTS, FAMILIES, IGNORED, OFF, OFF_IN, SAME
from headgrid.spec.model import ModelSpec
from headgrid.spec.rope import RopeScaling

FROM_TRANSFORMERS_4 = json.loads(Path(__file__).with_name("configs_of_transformers_4.json").read_text("utf-8"))
"""`Config().to_dict()` of transformers 4.46.3 and 4.57.6; what all families have in common is under `base`."""
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.title)
each_family = pytest.mark.parametrize("family", FAMILIES)


def saved(config: transformers.PreTrainedConfig, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text("utf-8"))


@each_variant
def test_both_spellings_and_the_live_config_say_the_same(variant: Variant, tmp_path: Path) -> None:
    config = variant.config()
    new = saved(config, tmp_path / "new")
    spec = read_spec(tmp_path / "new").spec
    assert spec == spec_from_config(config.to_dict(), "new")
    old = write_config(tmp_path / "old", old_spelling(new))
    assert read_spec(old).spec == spec_from_config(new, "old")
    # that the old spelling is one: transformers reads it as the same config
    again = type(config).from_pretrained(old).to_dict()
    assert spec_from_config(again, "new") == spec


@each_family
def test_absent_keys_have_the_defaults_of_the_config_class(family: str) -> None:
    config = CLASSES[family][0]()
    assert spec_from_config({"model_type": family}, "x") == spec_from_config(config.to_dict(), "x")
    theirs = config.to_dict()
    known = {key: value for key, value in DEFAULTS[family].items() if key in theirs and not key.startswith("rope_")}
    derived = {key for key, value in known.items() if value is None or key in ("layer_types", "sliding_window")}
    assert {key: theirs[key] for key in known.keys() - derived} == {key: known[key] for key in known.keys() - derived}
    assert len(known) - len(derived) >= 7


def parameters(family: str, config: transformers.PreTrainedConfig) -> int:
    """As transformers builds it, tied weights once."""
    with torch.device("meta"):
        kind = CLASSES[family][1]
        model = kind(config, add_pooling_layer=False) if family == "bert" else kind(config)
    return sum(parameter.numel() for parameter in model.parameters())


@each_family
def test_the_default_model_has_as_many_parameters_as_in_transformers(family: str) -> None:
    count = parameters(family, CLASSES[family][0]())
    assert spec_from_config({"model_type": family}, "x").num_parameters == count


@pytest.mark.parametrize("version", FROM_TRANSFORMERS_4)
def test_configs_of_transformers_4_are_read(version: str) -> None:
    found = FROM_TRANSFORMERS_4[version]
    families = set(found) - {"base"}
    assert len(families) >= 6
    sizes = {*SIZES, "head_dim", "query_pre_attn_scalar"}  # the only defaults that have changed
    for family in families:
        assert family_of(found[family]) == family
        whole = found["base"] | found[family]
        least = {"model_type": family} | {key: value for key, value in whole.items() if key in sizes}
        assert spec_from_config(whole, "x") == spec_from_config(least, "x"), family


# As published, with the published number of parameters; BERT's without its pooler.
LLAMA_31 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
 "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
 "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
 "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
 "vocab_size": 128256}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
 "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
QWEN_25 = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
 "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
 "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
 "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
 "transformers_version": "4.43.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
 "vocab_size": 151936}"""
QWEN_3 = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
 "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
 "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
 "use_sliding_window": false, "vocab_size": 151936}"""
GPT_2 = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
 "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
 "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
 "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
 "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
 "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
GEMMA_2 = """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
 "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
 "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
 "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
 "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
 "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
 "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 256000}"""
GEMMA_3 = """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
 "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
 "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
 "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
 "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
 "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
 "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}"""
BERT_BASE = """{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
 "gradient_checkpointing": false, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
 "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
 "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
 "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2,
 "use_cache": true, "vocab_size": 30522}"""
PUBLISHED = {
    "llama-3.1-8b": (LLAMA_31, 8_030_261_248, ("bfloat16", (128_001, 128_008, 128_009))),
    "mistral-7b": (MISTRAL_7B, 7_241_732_096, ("bfloat16", (2,))),
    "qwen2.5-0.5b": (QWEN_25, 494_032_768, ("bfloat16", (151_645,))),
    "qwen3-0.6b": (QWEN_3, 596_049_920, ("bfloat16", (151_645,))),
    "gpt2": (GPT_2, 124_439_808, (None, (50_256,))),
    "gemma-2-9b": (GEMMA_2, 9_241_705_984, ("float32", (1,))),
    "gemma-3-1b": (GEMMA_3, 999_885_952, ("bfloat16", (1, 106))),
    "bert-base": (BERT_BASE, 109_482_240 - 768 * 769, (None, ())),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    text, count, (dtype, stops) = PUBLISHED[name]
    found = read_spec(write_config(tmp_path / name, json.loads(text)))
    assert found.spec.num_parameters == count
    assert (found.spec.name, found.dtype, found.stop_tokens) == (name, dtype, stops)


def test_what_a_published_config_says() -> None:
    assert spec_from_config(json.loads(LLAMA_31), "llama") == ModelSpec(
        name="llama",
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_hidden_size=14_336,
        vocab_size=128_256,
        max_positions=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(
            kind="llama3", factor=8.0, original_positions=8192, low_factor=1.0, high_factor=4.0
        ),
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
    )  # fmt: skip
    gemma = spec_from_config(json.loads(GEMMA_3), "gemma")
    assert [gemma.window(layer) for layer in range(7)] == [512] * 5 + [0, 512]
    assert gemma.rope(0).theta == 10_000.0 and gemma.rope(5).theta == 1e6
    assert (gemma.embedding_scale, gemma.scale, gemma.tied_embeddings) == (1152**0.5, 1 / 16, True)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("layers", [1, 6, 13])
def test_which_layers_slide_is_as_in_transformers(family: str, layers: int) -> None:
    theirs = [kind == FULL for kind in CLASSES[family][0](num_hidden_layers=layers).layer_types]
    ours = spec_from_config({"model_type": family, "num_hidden_layers": layers}, "x")
    assert [not ours.window(layer) for layer in range(layers)] == theirs


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 2, 40])
@pytest.mark.parametrize("used", [True, False])
def test_windows_of_qwen_are_those_of_transformers(family: str, first: int, used: bool) -> None:
    options = SIZES | {"use_sliding_window": used, "sliding_window": 9, "max_window_layers": first}
    theirs = CLASSES[family][0](**options)
    ours = spec_from_config(options | {"model_type": family}, "x")
    assert [ours.window(layer) == 9 for layer in range(3)] == [kind == SLIDING for kind in theirs.layer_types]


# For each key a value that another model has; "with" is what makes the key speak.
OTHERS: dict[str, object] = {
    "rope_theta": 77.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
    "hidden_size": 72, "num_hidden_layers": 5, "num_attention_heads": 10, "head_dim": 20, "hidden_act": "relu",
    "rms_norm_eps": 0.01, "vocab_size": 99, "intermediate_size": 98, "num_key_value_heads": 3,
    "max_position_embeddings": 97, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
    "layer_types": [SLIDING, SLIDING, FULL], "hidden_activation": "silu", "query_pre_attn_scalar": 19,
    "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0, "rope_local_base_freq": 78.0,
    "sliding_window_pattern": 2, "n_positions": 97, "n_embd": 72, "n_layer": 5, "n_head": 12, "n_inner": 98,
    "activation_function": "relu", "layer_norm_epsilon": 0.01, "type_vocab_size": 3, "layer_norm_eps": 0.01,
    "eos_token_id": 3,
}  # fmt: skip
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "scale_attn_weights")
WITH = {key: {"use_sliding_window": True} for key in ("max_window_layers", "sliding_window", "layer_types")}
SILENT = {"partial_rotary_factor", "position_embedding_type"}
"""Keys with one legal value."""
GEMMA_3_ROPE = {FULL: {"rope_theta": 77.0}, SLIDING: {"rope_theta": 78.0}}


@each_family
def test_every_key_that_is_read_changes_the_model(family: str, tmp_path: Path) -> None:
    base = {"n_embd": 60, "n_head": 6, "n_layer": 3} if family == "gpt2" else {**SIZES, "max_window_layers": 1}
    base = {key: value for key, value in base.items() if key in DEFAULTS[family]} | {"model_type": family}
    for key in DEFAULTS[family].keys() - SILENT:
        value = OTHERS.get(key, not DEFAULTS[family][key] if key in FLAGS else None)
        value = GEMMA_3_ROPE if (family, key) == ("gemma3_text", "rope_parameters") else value
        assert value is not None, key
        needed = {name: each for name, each in WITH.get(key, {}).items() if name in DEFAULTS[family]}
        plain, changed = base | needed, base | needed | {key: value}
        if key == "num_key_value_heads":
            changed |= {"num_attention_heads": 6}
        found = [read_spec(write_config(tmp_path / "x", each)) for each in (plain, changed)]
        assert found[0] != found[1], key


@each_family
def test_every_ignored_key_changes_nothing(family: str) -> None:
    base = {"model_type": family}
    ignored = dict.fromkeys(IGNORED[family] - {"model_type"}, "whatever")
    assert spec_from_config(base | ignored, "x") == spec_from_config(base, "x")


@each_family
def test_a_key_is_in_one_table_only(family: str) -> None:
    tables = (DEFAULTS[family], IGNORED[family], {**OFF, **OFF_IN.get(family, {})}, SAME.get(family, {}))
    keys = [key for table in tables for key in table]
    assert len(keys) == len(set(keys))


@each_family
@pytest.mark.parametrize("value", [None, False, 0, {}, []])
def test_what_is_switched_off_is_no_obstacle(family: str, value: object) -> None:
    off = dict.fromkeys([*OFF, *OFF_IN.get(family, {})], value)
    assert spec_from_config({"model_type": family} | off, "x") == spec_from_config({"model_type": family}, "x")
    for key in off:
        with pytest.raises(InvalidInput, match=key):
            spec_from_config({"model_type": family, key: 1}, "x")


def test_every_family_is_tested() -> None:
    assert set(FAMILIES_TESTED) == set(FAMILIES) == set(CLASSES)


# stop tokens and dtypes


@pytest.mark.parametrize("eos", [7, [7, 9], None])
def test_stop_tokens_are_those_of_the_generation_config(eos: object, tmp_path: Path) -> None:
    config = CLASSES["llama"][0](**SIZES, eos_token_id=5)
    model = CLASSES["llama"][1](config)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    theirs = CLASSES["llama"][1].from_pretrained(tmp_path).generation_config.eos_token_id
    expected = tuple(theirs) if isinstance(theirs, list) else () if theirs is None else (theirs,)
    assert read_spec(tmp_path).stop_tokens == stop_tokens(tmp_path) == expected
    os.remove(tmp_path / "generation_config.json")
    assert stop_tokens(tmp_path) == (5,)


def test_a_stop_token_is_named_once(tmp_path: Path) -> None:
    assert stop_tokens(write_config(tmp_path, {"model_type": "bert", "eos_token_id": [4, 2, 4]})) == (4, 2)
    assert stop_tokens(write_config(tmp_path, {"model_type": "bert"})) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_the_saved_one(dtype: torch.dtype, tmp_path: Path) -> None:
    config = CLASSES["qwen3"][0](**SIZES, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert checkpoint_dtype(config.to_dict()) == checkpoint_dtype(saved(config, tmp_path)) == name
    assert checkpoint_dtype({"torch_dtype": name}) == checkpoint_dtype({"torch_dtype": f"torch.{name}"}) == name
    assert checkpoint_dtype({"torch_dtype": None}) is None


def test_a_snapshot_of_a_cache_is_named_as_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--tiny" / "snapshots" / "0123abc"
    assert read_spec(write_config(folder, {"model_type": "gpt2"})).spec.name == "tiny"
