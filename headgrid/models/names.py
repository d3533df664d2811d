"""Where each tensor of a model is in a checkpoint of its family: names, and which rows of a stored tensor it is."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from headgrid.errors import InvalidInput
from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.models.families import Family
from headgrid.models.files import shown
from headgrid.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the model as rows `first_row`... of a stored one; of a `transposed` matrix, as its columns.

    (GPT-2 stores [in, out], and Q, K and V as one matrix.)
    """

    name: str
    transposed: bool = False
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class _Naming:
    """`top` is what lies outside of layers, `layer` what lies in `layers.I`, by our names without weight or bias.

    `prefixes` are what whole models and bare ones write before all names but the head's. `ignorable` matches names,
    without a prefix, of what is stored and not needed.
    """

    prefixes: tuple[str, str]
    layers: str
    top: Mapping[str, str]
    layer: Mapping[str, str]
    ignorable: re.Pattern[str]
    transposed: bool = False


_HEAD = "lm_head"
_DECODER_TOP = {"embedding": "embed_tokens", "final.norm": "norm"}
_DECODER_LAYER = {
    "attention.norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GEMMA_LAYER = _DECODER_LAYER | {
    "attention.post_norm": "post_attention_layernorm",
    "mlp.norm": "pre_feedforward_layernorm",
    "mlp.post_norm": "post_feedforward_layernorm",
}
_INVERSE_FREQUENCIES = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|lm_head\.weight")
_LLAMA = _Naming(("model.", ""), "layers", _DECODER_TOP, _DECODER_LAYER, _INVERSE_FREQUENCIES)
_GEMMA = _Naming(("model.", ""), "layers", _DECODER_TOP, _GEMMA_LAYER, _INVERSE_FREQUENCIES)
_GPT2 = _Naming(
    ("transformer.", ""),
    "h",
    {"embedding": "wte", "positions": "wpe", "final.norm": "ln_f"},
    {
        "attention.norm": "ln_1",
        **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn.c_attn"),
        "attention.o": "attn.c_proj",
        "mlp.norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight"),  # buffers of older versions: the causal mask
    transposed=True,
)
_BERT = _Naming(
    ("bert.", ""),
    "encoder.layer",
    {
        "embedding": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "embedding.norm": "embeddings.LayerNorm",
    },
    {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp.norm": "output.LayerNorm",
    },
    re.compile(r"embeddings\.position_ids|pooler\.dense\.(weight|bias)|cls\..*"),
)
_NAMINGS: Mapping[Family, _Naming] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gpt2": _GPT2,
    "bert": _BERT,
}
_OLD_KINDS = {"weight": "gamma", "bias": "beta"}
"""How BERT's norms were named before transformers existed; its first checkpoints still have it so."""


def sources(model: ModelSpec, family: Family, stored: Collection[str]) -> dict[str, Source]:
    """For every tensor of `model`, by its global name, where it is among the `stored` names.

    Raises InvalidInput that names what is not there.
    """
    naming, stored = _NAMINGS[family], frozenset(stored)
    top = f"{naming.top['embedding']}.weight"
    prefix = next((each for each in naming.prefixes if each + top in stored), naming.prefixes[0])
    last = f"{prefix}{_stored_stem(naming, f'layers.{model.num_layers - 1}.attention.q')}.weight"
    if last not in stored:  # seen before the tensors of maybe a thousand layers are listed
        raise _lacking(last, f"config.json says {model.num_layers} layers", prefix)
    found: dict[str, Source] = {}
    for name, shard in parameters(model, Layout(), 0).items():
        stem, _, kind = name.rpartition(".")
        source = _HEAD if stem == "head" else prefix + _stored_stem(naming, stem)
        transposed = naming.transposed and stem.startswith("layers.") and len(shard.shape) == 2
        old = f"{source}.{_OLD_KINDS[kind]}"
        full = old if family == "bert" and old in stored else f"{source}.{kind}"
        found[name] = Source(full, transposed, _first_row(model, naming, stem))
    if model.tied_embeddings and found["embedding.weight"].name not in stored and f"{_HEAD}.weight" in stored:
        found["embedding.weight"] = Source(f"{_HEAD}.weight")  # which of the two is stored is the writer's choice
    _check_there(found, stored, prefix)
    return found


def _stored_stem(naming: _Naming, stem: str) -> str:
    if not stem.startswith("layers."):
        return naming.top[stem]
    _, layer, part = stem.split(".", 2)
    return f"{naming.layers}.{layer}.{naming.layer[part]}"


def _first_row(model: ModelSpec, naming: _Naming, stem: str) -> int:
    """Of K and V where they are stored below Q."""
    part = stem.split(".", 2)[-1]
    if naming.layer.get("attention.q") != naming.layer.get("attention.k"):
        return 0
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {"attention.k": q_size, "attention.v": q_size + kv_size}.get(part, 0)


def _check_there(found: Mapping[str, Source], stored: Collection[str], prefix: str) -> None:
    missing = list(dict.fromkeys(source.name for source in found.values() if source.name not in stored))
    if not missing:
        return
    numbers = f"{len(missing)} tensors that config.json implies are not among the {len(stored)} stored ones"
    raise _lacking(missing[0], numbers, prefix)


def _lacking(name: str, numbers: str, prefix: str) -> InvalidInput:
    why = f"the checkpoint's names are taken to begin with {prefix!r}" if prefix else ""
    if name == f"{_HEAD}.weight":
        why = "tie_word_embeddings of config.json is false, so that the head is no copy of the embeddings"
    return InvalidInput(f"the checkpoint lacks {name}", numbers=numbers, why=why)


def ignorable(family: Family, name: str) -> bool:
    """Whether a stored tensor that no source names may be there: buffers, what is behind an encoder, a tied head."""
    naming = _NAMINGS[family]
    bare = name.removeprefix(naming.prefixes[0])
    return naming.ignorable.fullmatch(bare) is not None


def check_left_over(family: Family, found: Mapping[str, Source], stored: Collection[str]) -> None:
    """Raise InvalidInput for a stored tensor that is neither needed nor ignorable: the model would be another one."""
    needed = {source.name for source in found.values()}
    left = sorted(name for name in stored if name not in needed and not ignorable(family, name))
    if left:
        raise InvalidInput(
            f"the checkpoint holds {shown(left[0])}, which a {family} of this config.json does not have",
            numbers=f"{len(left)} such tensors beside {len(needed)} that are needed",
            why="a model that leaves them out would be another one",
        )


def copies(found: Mapping[str, Source], stored: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of stored tensors that must be equal for a tied model to be the stored one.

    Where both the embeddings and a head are stored though they are tied, transformers ties them only if they are equal.
    """
    embedding, head = found["embedding.weight"].name, f"{_HEAD}.weight"
    stray = head in stored and "head.weight" not in found and embedding != head
    return ((embedding, head),) if stray else ()
