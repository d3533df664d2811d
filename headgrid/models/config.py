"""config.json of a Hugging Face checkpoint as a ModelSpec.

It is read against the tables of `families`: what is not known there is refused by name, nothing in it is executed,
and keys that are absent have the defaults of transformers' Config classes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput
from headgrid.models.families import DEFAULTS, FAMILIES, IGNORED, NOT_SUPPORTED, OFF, OFF_IN, SAME, Family
from headgrid.models.fields import Fields
from headgrid.models.files import inside, read_json, shown
from headgrid.models.rotary import MOST_POSITIONS, rotary, rotary_by_kind
from headgrid.spec.model import BIASES, ModelSpec

CONFIG_LIMIT_BYTES = 1 << 20
_MOST_LAYERS, _MOST_HEADS, _WIDEST, _LARGEST_VOCABULARY = 1024, 1 << 14, 1 << 22, 1 << 27
_MOST_STOPS = 1000
_ACTIVATIONS: Mapping[str, str] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
}
_DTYPES = {name: name for name in ("float32", "float16", "bfloat16", "float64")}
_DTYPES |= {f"torch.{name}": name for name in _DTYPES}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a folder says of its model, apart from the weights.

    `dtype` is that of the weights as config.json names it ("float32", "float16", "bfloat16", "float64"), None where it
    does not. `stop_tokens` are the ids behind any of which a text ends.
    """

    spec: ModelSpec
    family: Family
    dtype: str | None
    stop_tokens: tuple[int, ...]


def read_spec(folder: Path) -> ModelConfig:
    """The model of a folder in Hugging Face format, named as the folder is.

    Raises InvalidInput if config.json is missing, not strictly JSON, larger than 1 MB, not a regular file of the
    folder, or describes something else than a model of a supported family.
    """
    config = _read(folder, "config.json")
    spec = spec_from_config(config, _name(folder))
    return ModelConfig(spec, family_of(config), checkpoint_dtype(config), stop_tokens(folder))


def spec_from_config(config: Mapping[str, object], name: str) -> ModelSpec:
    """The model that the keys of a config.json (or `config.to_dict()` of transformers) describe.

    Raises InvalidInput that names the key, the value and what is legal.
    """
    family = family_of(config)
    return ModelSpec(name=name, **_READERS[family](_checked(config, family)))


def family_of(config: Mapping[str, object]) -> Family:
    """`model_type`. Raises InvalidInput if it is none of FAMILIES; custom code is named, and never run."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind == family:
            return family
    why = NOT_SUPPORTED.get(kind, "") if isinstance(kind, str) else "every config.json of transformers has one"
    if "auto_map" in config:
        why = f"it needs code of its own (auto_map: {shown(_first(config['auto_map']))}), which is never run"
    raise InvalidInput(f"model_type {shown(kind)} is not supported", why=why, legal=FAMILIES)


def checkpoint_dtype(config: Mapping[str, object]) -> str | None:
    """The dtype of the weights, of which newer files say `dtype` and older ones `torch_dtype`; None if neither does."""
    fields = Fields("config.json", {"dtype": None, "torch_dtype": None} | dict(config))
    for key in ("dtype", "torch_dtype"):
        if fields.given(key):
            return fields.choice(key, _DTYPES)
    return None


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """The ids behind any of which a text ends: of generation_config.json where there is one, else of config.json.

    As in transformers: a generation_config.json without `eos_token_id` means that nothing ends a text.
    """
    name = "generation_config.json"
    if inside(folder, name).exists():
        return _ids(Fields(name, {"eos_token_id": None} | dict(_read(folder, name))))
    config = _read(folder, "config.json")
    defaults = DEFAULTS[family_of(config)]
    return _ids(Fields("config.json", {"eos_token_id": defaults["eos_token_id"]} | dict(config)))


def _ids(fields: Fields) -> tuple[int, ...]:
    value = fields.values["eos_token_id"]
    values = [] if value is None else value if isinstance(value, list) else [value]
    ids = [each for each in values if type(each) is int and 0 <= each < _LARGEST_VOCABULARY]
    if len(ids) < len(values) or len(ids) > _MOST_STOPS:
        fields.refuse("eos_token_id", f"a token's id or a list of at most {_MOST_STOPS}")
    return tuple(dict.fromkeys(ids))


def _read(folder: Path, name: str) -> Mapping[str, object]:
    value = read_json(inside(folder, name), CONFIG_LIMIT_BYTES, name)
    if not isinstance(value, dict):
        raise InvalidInput(f"{name} holds {shown(value)} instead of an object")
    return value


def _name(folder: Path) -> str:
    """The folder's; of a snapshot of a Hugging Face cache (models--OWNER--NAME/snapshots/REVISION) the model's."""
    path = folder.resolve()
    return path.parent.parent.name.split("--")[-1] if path.parent.name == "snapshots" else path.name


def _first(value: object) -> object:
    return next(iter(value.values()), None) if isinstance(value, dict) else value


def _checked(config: Mapping[str, object], family: Family) -> Fields:
    """The keys that matter, all of them known. Raises InvalidInput for what is unknown or not supported."""
    known, off, same = DEFAULTS[family], {**OFF, **OFF_IN.get(family, {})}, SAME.get(family, {})
    for key, value in config.items():
        if key in off and value not in (None, False, 0) and value != [] and value != {}:
            raise InvalidInput(f"config.json: {key} = {shown(value)} is not supported", why=off[key])
        if not (key in known or key in off or key in same or key in IGNORED[family]):
            raise InvalidInput(
                f"config.json: {shown(key)} is not a key of the family {family} that is known here",
                why="it could change what the model computes; if it does not, remove it",
                legal=tuple(known),
            )
    values = {**known, **{key: value for key, value in config.items() if key in known}}
    for key, other in same.items():
        if config.get(key) not in (None, values[other]):
            raise InvalidInput(
                f"config.json: {key} = {shown(config[key])} contradicts {other} = {shown(values[other])}"
            )
    return Fields("config.json", values)


def _sizes(config: Fields, **keys: str) -> dict[str, int]:
    """Fields of ModelSpec from the keys that a family has for them."""
    highest = {"num_layers": _MOST_LAYERS, "num_heads": _MOST_HEADS, "num_kv_heads": _MOST_HEADS}
    highest |= {"vocab_size": _LARGEST_VOCABULARY, "max_positions": MOST_POSITIONS}
    return {field: config.whole(key, highest.get(field, _WIDEST)) for field, key in keys.items()}


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise InvalidInput(
            "config.json: the hidden size is not a whole number of heads",
            numbers=f"{hidden_size} % {num_heads} = {hidden_size % num_heads}",
            legal=("head_dim where the family has it",),
        )
    return hidden_size // num_heads


def _decoder(config: Fields) -> dict[str, Any]:
    """What the families since Llama have in common."""
    keys = {"num_layers": "num_hidden_layers", "mlp_hidden_size": "intermediate_size", "hidden_size": "hidden_size"}
    keys |= {"num_heads": "num_attention_heads", "vocab_size": "vocab_size", "max_positions": "max_position_embeddings"}
    keys |= {field: key for field, key in _OPTIONAL.items() if config.given(key)}
    sizes = _sizes(config, **keys)
    sizes.setdefault("num_kv_heads", sizes["num_heads"])
    if "head_dim" not in sizes:
        sizes["head_dim"] = _head_dim(sizes["hidden_size"], sizes["num_heads"])
    act = "hidden_activation" if "hidden_activation" in config.values else "hidden_act"
    return {
        **sizes,
        "norm": "rms",
        "norm_eps": config.number("rms_norm_eps", 1.0),
        "activation": config.choice(act, _ACTIVATIONS),
        "gated_mlp": True,
        "tied_embeddings": config.flag("tie_word_embeddings"),
    }


_OPTIONAL = {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}


def _rope(config: Fields) -> dict[str, Any]:
    found = rotary(config)
    return {"rope_theta": found.theta, "rope_scaling": found.scaling}


def _attention_biases(config: Fields) -> tuple[str, ...]:
    return ("qkv", "o") if config.flag("attention_bias") else ()


def _llama(config: Fields) -> dict[str, Any]:
    biases = _attention_biases(config) + (("mlp",) if config.flag("mlp_bias") else ())
    return _decoder(config) | _rope(config) | {"linear_bias": biases}


def _mistral(config: Fields) -> dict[str, Any]:
    return _decoder(config) | _rope(config) | {"sliding_window": _window(config)}


def _qwen2(config: Fields) -> dict[str, Any]:
    return _decoder(config) | _rope(config) | _qwen_windows(config) | {"linear_bias": ("qkv",)}


def _qwen3(config: Fields) -> dict[str, Any]:
    special = {"linear_bias": _attention_biases(config), "qk_norm": True}
    return _decoder(config) | _rope(config) | _qwen_windows(config) | special


def _gemma(config: Fields) -> dict[str, Any]:
    found = _decoder(config)
    return found | {
        "embedding_scale": math.sqrt(found["hidden_size"]),
        "norm_unit_offset": True,
        "norm_placement": "both",
        "linear_bias": _attention_biases(config),
        "attention_scale": 1 / math.sqrt(config.number("query_pre_attn_scalar", 1e9)),
        "final_logit_softcapping": _cap(config, "final_logit_softcapping"),
    }


def _gemma2(config: Fields) -> dict[str, Any]:
    found: dict[str, Any] = (
        _gemma(config) | _rope(config) | {"attn_logit_softcapping": _cap(config, "attn_logit_softcapping")}
    )
    return found | _windows(config, [layer % 2 == 0 for layer in range(found["num_layers"])])


def _gemma3(config: Fields) -> dict[str, Any]:
    found, (full, local) = _gemma(config), rotary_by_kind(config)
    every = config.whole("sliding_window_pattern", _MOST_LAYERS)
    found |= {"rope_theta": full.theta, "rope_scaling": full.scaling, "local_rope_theta": local.theta, "qk_norm": True}
    return found | _windows(config, [(layer + 1) % every != 0 for layer in range(found["num_layers"])])


def _gpt2(config: Fields) -> dict[str, Any]:
    keys = {"num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head", "max_positions": "n_positions"}
    sizes = _sizes(config, **keys, num_kv_heads="n_head", vocab_size="vocab_size")
    inner = config.whole("n_inner", _WIDEST) if config.given("n_inner") else 4 * sizes["hidden_size"]
    return {
        **sizes,
        "head_dim": _head_dim(sizes["hidden_size"], sizes["num_heads"]),
        "mlp_hidden_size": inner,
        "positions": "learned",
        "tied_embeddings": config.flag("tie_word_embeddings"),
        "norm_eps": config.number("layer_norm_epsilon", 1.0),
        "activation": config.choice("activation_function", _ACTIVATIONS),
        "linear_bias": BIASES,
        "attention_scale": None if config.flag("scale_attn_weights") else 1.0,
    }


def _bert(config: Fields) -> dict[str, Any]:
    config.choice("position_embedding_type", {"absolute": True})
    keys = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "mlp_hidden_size": "intermediate_size"}
    keys |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads", "vocab_size": "vocab_size"}
    sizes = _sizes(config, **keys, max_positions="max_position_embeddings", token_types="type_vocab_size")
    return {
        **sizes,
        "head_dim": _head_dim(sizes["hidden_size"], sizes["num_heads"]),
        "positions": "learned",
        "embedding_norm": True,
        "norm_eps": config.number("layer_norm_eps", 1.0),
        "norm_placement": "post",
        "activation": config.choice("hidden_act", _ACTIVATIONS),
        "linear_bias": BIASES,
        "is_causal": False,
        "head": "none",
    }


_READERS: Mapping[Family, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "bert": _bert,
}


def _cap(config: Fields, key: str) -> float:
    return config.number(key, 1e9) if config.given(key) else 0.0


def _window(config: Fields) -> int:
    """Keys that a query sees, itself included, as transformers' masks count them too; 0 for all."""
    return config.whole("sliding_window", MOST_POSITIONS) if config.given("sliding_window") else 0


def _qwen_windows(config: Fields) -> dict[str, Any]:
    """With `use_sliding_window`, layers from `max_window_layers` on slide."""
    window = _window(config) if config.flag("use_sliding_window") else 0
    first = config.whole("max_window_layers", MOST_POSITIONS, lowest=0)
    layers = config.whole("num_hidden_layers", _MOST_LAYERS)
    return _windows(config, [window > 0 and layer >= first for layer in range(layers)], window)


def _windows(config: Fields, slides: list[bool], window: int | None = None) -> dict[str, Any]:
    """`slides` says which layers have a window where `layer_types` does not."""
    window = _window(config) if window is None else window
    if config.given("layer_types"):
        slides = _layer_types(config, len(slides))
    if not any(slides):
        return {}
    if not window:
        raise InvalidInput(
            "config.json: there are layers with a sliding window, but no window",
            numbers=f"{sum(slides)} of {len(slides)} layers, sliding_window = {shown(config.values['sliding_window'])}",
        )
    full = tuple(layer for layer, slide in enumerate(slides) if not slide)
    return {"sliding_window": window, "full_attention_layers": full}


def _layer_types(config: Fields, num_layers: int) -> list[bool]:
    """Which layers slide."""
    kinds, legal = config.values["layer_types"], ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        config.refuse("layer_types", f"a list of {num_layers} words, one for each layer")
    unknown = [kind for kind in kinds if kind not in legal]
    if unknown:
        raise InvalidInput(f"config.json: layers of type {shown(unknown[0])} are not supported", legal=legal)
    return [kind == "sliding_attention" for kind in kinds]
