"""Tiny models of every family as transformers builds them, with awkward heads and weights that hide nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from headgrid.models.names import Source

VOCAB, LAYERS = 61, 3
SIZES: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": 64,
}
GPT2: dict[str, object] = {"vocab_size": VOCAB, "n_embd": 60, "n_layer": LAYERS, "n_head": 6, "n_positions": 64}
BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GEMMA = SIZES | {"head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": 5}
THETA = {"rope_theta": 500.0}
LINEAR = THETA | {"rope_type": "linear", "factor": 3.0}
LLAMA3 = THETA | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.5}
LLAMA3 |= {"original_max_position_embeddings": 24}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARNS = {
    "yarn": YARN,
    "yarn-factor": YARN | {"attention_factor": 0.7},
    "yarn-mscale": YARN | {"mscale": 0.9, "mscale_all_dim": 0.4},
    "yarn-one-mscale": YARN | {"mscale": 0.9},
    "yarn-betas": YARN | {"beta_fast": 3.0, "beta_slow": 0.5},
    "yarn-exact": YARN | {"beta_fast": 2.0, "truncate": False},
    "yarn-ratio": {key: value for key, value in YARN.items() if key != "factor"} | {"factor": None},
    "yarn-no-original": {key: value for key, value in YARN.items() if not key.startswith("original")},
}
SCALINGS = {"linear": LINEAR, "llama3": LLAMA3, **YARNS}
FULL, SLIDING = "full_attention", "sliding_attention"
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "bert": (transformers.BertConfig, transformers.BertModel),
}


@dataclass(frozen=True, eq=False)
class Variant:
    """A family with some options of its Config class."""

    family: str
    name: str
    options: Mapping[str, object]

    @property
    def title(self) -> str:
        return f"{self.family}-{self.name}"

    def config(self) -> transformers.PreTrainedConfig:
        return CLASSES[self.family][0](**json.loads(json.dumps(self.options)))  # classes write into what they get


def _variants(family: str, base: Mapping[str, object], **others: Mapping[str, object]) -> list[Variant]:
    named = {"plain": {}, **others}
    return [Variant(family, name.replace("_", "-"), {**base, **options}) for name, options in named.items()]


def _rotary(family: str, base: Mapping[str, object], kinds: Mapping[str, object]) -> list[Variant]:
    return [Variant(family, name, {**base, "rope_parameters": values}) for name, values in kinds.items()]


WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
BY_KIND = {FULL: {"rope_type": "default", "rope_theta": 900.0}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
VARIANTS = (
    *_variants(
        *("llama", SIZES | {"rope_parameters": THETA | {"rope_type": "default"}}),
        one_kv_head={"num_key_value_heads": 1},
        all_heads={"num_key_value_heads": None},
        wide_heads={"head_dim": 14},
        biases={"attention_bias": True, "mlp_bias": True},
        attention_biases={"attention_bias": True},
        tied={"tie_word_embeddings": True},
        gelu={"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    ),
    *_rotary("llama", SIZES, SCALINGS),
    *_variants("mistral", SIZES | {"sliding_window": 5}, no_window={"sliding_window": None}, wide={"head_dim": 14}),
    *_rotary("mistral", SIZES | {"sliding_window": 7}, {"yarn": YARN}),
    *_variants(
        *("qwen2", SIZES),
        tied={"tie_word_embeddings": True},
        windows=WINDOWS,
        no_windows=WINDOWS | {"max_window_layers": LAYERS},
        listed=WINDOWS | {"layer_types": [SLIDING, FULL, SLIDING]},
        seven_heads={"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 70},
    ),
    *_rotary("qwen2", SIZES | WINDOWS, {"yarn": YARN}),
    *_variants(
        *("qwen3", SIZES | {"head_dim": 14, "rms_norm_eps": 1e-3}),
        windows=WINDOWS,
        biases={"attention_bias": True},
        tied={"tie_word_embeddings": True},
    ),
    *_rotary("qwen3", SIZES | {"head_dim": 10}, {"yarn": YARN, "linear": LINEAR}),
    *_variants(
        *("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
        no_caps={"attn_logit_softcapping": None, "final_logit_softcapping": None},
        listed={"layer_types": [FULL, FULL, SLIDING]},
        all_full={"layer_types": [FULL] * LAYERS},
        biases={"attention_bias": True},
        untied={"tie_word_embeddings": False},
        relu={"hidden_activation": "relu"},
    ),
    *_rotary("gemma2", GEMMA, {"linear": LINEAR}),
    *_variants(
        *("gemma3_text", GEMMA | {"layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": BY_KIND}),
        linear={"rope_parameters": BY_KIND | {FULL: LINEAR}},
        yarn={"rope_parameters": BY_KIND | {FULL: YARN}},
        every_second={"layer_types": None, "sliding_window_pattern": 2},
        every_sixth={"layer_types": None, "num_hidden_layers": 7},
        capped={"final_logit_softcapping": 2.0, "rms_norm_eps": 1e-3},
        biases={"attention_bias": True, "tie_word_embeddings": False},
    ),
    *_variants(
        *("gpt2", GPT2),
        narrow={"n_inner": 52, "activation_function": "relu"},
        unscaled={"scale_attn_weights": False},
        untied={"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2, "activation_function": "gelu"},
    ),
    *_variants(*("bert", BERT), relu={"hidden_act": "relu", "layer_norm_eps": 1e-2}, segments={"type_vocab_size": 3}),
)
FAMILIES_TESTED = tuple(dict.fromkeys(variant.family for variant in VARIANTS))
PLAIN = tuple(variant for variant in VARIANTS if variant.name == "plain")


def scatter(model: nn.Module) -> nn.Module:
    """Weights far from their initialisation, under which attention is almost uniform and all biases are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and any(part in name.lower() for part in ("norm", "ln_"))
            centre = 1.0 if norm and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def build(variant: Variant) -> nn.Module:
    config = variant.config()
    config._attn_implementation = "eager"  # the only one that caps scores
    options = {"add_pooling_layer": False} if variant.family == "bert" else {}
    return scatter(CLASSES[variant.family][1](config, **options))


def old_spelling(new: Mapping[str, object]) -> dict[str, object]:
    """A config.json as transformers 4 wrote it."""
    found = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    found["torch_dtype"] = new.get("dtype", "float32")
    rope = new.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    kind_key = "type"
    if FULL in rope:
        found["rope_local_base_freq"], rope, kind_key = rope[SLIDING]["rope_theta"], rope[FULL], "rope_type"
    rope = dict(rope)
    found["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    found["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    return found


def write_config(folder: Path, config: Mapping[str, object], name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def whole(stored: Mapping[str, Tensor], source: Source, rows: int) -> Tensor:
    """A tensor of ours with so many rows, cut out of what the safetensors library has read."""
    tensor = stored[source.name].T if source.transposed else stored[source.name]
    return tensor[source.first_row : source.first_row + rows]
