"""The transformer as a value: sizes and choices, nothing executable."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

from headgrid.errors import InvalidInput
from headgrid.spec.rope import Rope, RopeScaling

Biased = Literal["qkv", "o", "mlp"]
BIASES: tuple[Biased, ...] = ("qkv", "o", "mlp")
"""Linear layers that may have biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A transformer of one stack of layers, a decoder or an encoder. Sizes are global: no layout ever changes them.

    Names are those of Hugging Face configs where one exists.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_hidden_size: int
    vocab_size: int
    max_positions: int
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    """Of layers with a sliding window, which are then not scaled (Gemma 3); 0 means rope_theta, scaled, for all."""
    rotary_dim: int = 0
    """Leading channels of a head that rotary positions turn (GPT-NeoX, Phi); 0 means all of them."""
    token_types: int = 0
    """Rows of a table of which the first is added to every embedding (BERT: texts of one segment); 0 for none."""
    embedding_scale: float = 1.0
    """Factor of the embeddings, rounded to the weights' dtype (Gemma)."""
    embedding_norm: bool = False
    """A norm behind the sum of the embeddings (BERT)."""
    tied_embeddings: bool = False
    norm: Literal["layer", "rms"] = "layer"
    """Layer norms (Ba et al. 2016), or norms by the root mean square, without bias (Zhang, Sennrich 2019)."""
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    """RMS norms multiply by 1 + weight (Gemma)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Where each half of a layer has its norm: on what it gets, behind the sum (BERT), or on what it gets and gives
    (Gemma 2)."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    gated_mlp: bool = False
    """activation(x W_gate) x W_up instead of activation(x W_up) (Shazeer 2020)."""
    linear_bias: tuple[Biased, ...] = ()
    """Which linear layers have biases: all of them in GPT-2, `qkv` in Qwen 2. The head has none."""
    is_causal: bool = True
    """False: every position attends to the whole sequence, as encoders do; such a model is not decoded."""
    attention_scale: float | None = None
    """Factor of the scores; None means 1/sqrt(head_dim)."""
    attn_logit_softcapping: float = 0.0
    """Scores become cap x tanh(score / cap) (Gemma 2); 0 means they stay."""
    sliding_window: int = 0
    """Keys that a query sees, itself included (Mistral); 0 means all before it."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers without a sliding window where the others have one."""
    qk_norm: bool = False
    """An RMS norm over each Q and each K head before rotary positions, with a weight of head_dim (Qwen 3)."""
    head: Literal["vocabulary", "none"] = "vocabulary"
    """What the last layer's hidden states become: logits, or with none themselves (an encoder's embeddings)."""
    final_logit_softcapping: float = 0.0
    """Logits become cap x tanh(logit / cap) (Gemma 2); 0 means they stay."""
    attention_gain: float = 1.0
    """Standard deviation of freshly drawn W_Q and W_K times sqrt(hidden_size).

    Scores of such a model have a standard deviation near its square; at 1 attention is almost uniform, and then
    an error in the attention hardly shows in the logits. Drawn models that serve as tests use 2 and more.
    """

    def __post_init__(self) -> None:
        """Raise InvalidInput for sizes no transformer has."""
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mlp_hidden_size")
        for field in (*sizes, "vocab_size", "max_positions"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{field} = {value!r} is not a positive whole number", numbers=f"model {self.name}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly",
                numbers=f"{self.num_heads} % {self.num_kv_heads} = {self.num_heads % self.num_kv_heads}",
            )
        self._as_values()
        self._check_attention()
        self._check_rest()

    def _as_values(self) -> None:
        """JSON has lists and objects only."""
        for field in ("linear_bias", "full_attention_layers"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        scaling: Any = self.rope_scaling
        if isinstance(scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**cast(dict[str, Any], scaling)))

    def _check_rest(self) -> None:
        if set(self.linear_bias) - set(BIASES):
            raise InvalidInput(f"linear_bias = {self.linear_bias!r} is not known", legal=BIASES)
        for field in ("embedding_scale", "rope_theta", "norm_eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise InvalidInput(f"{field} = {getattr(self, field)} is not a positive number")
        if self.norm_unit_offset and self.norm != "rms":
            raise InvalidInput("norm_unit_offset goes with RMS norms")
        if self.head == "none" and (self.tied_embeddings or self.is_causal or self.final_logit_softcapping):
            raise InvalidInput("a model without a head is an encoder: neither causal nor tied, and without logits")

    def _check_attention(self) -> None:
        if self.rotated_dim % 2 or self.rotated_dim > self.head_dim:
            raise InvalidInput(
                f"rotary positions turn pairs of channels: {self.rotated_dim} of head_dim {self.head_dim} cannot be"
            )
        for field in ("rotary_dim", "sliding_window", "token_types"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 0:
                what = f"{field} = {getattr(self, field)} is not a whole number from 0 on"
                raise InvalidInput(what, legal=("0 for none",))
        for field in ("attn_logit_softcapping", "final_logit_softcapping", "local_rope_theta"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InvalidInput(f"{field} = {getattr(self, field)} is not a number from 0 on", legal=("0 for none",))
        if any(type(layer) is not int or not 0 <= layer < self.num_layers for layer in self.full_attention_layers):
            raise InvalidInput(f"full_attention_layers = {self.full_attention_layers} of {self.num_layers} layers")
        if self.rotary_dim and self.positions != "rotary":
            raise InvalidInput(f"rotary_dim {self.rotary_dim} needs rotary positions, not {self.positions}")
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise InvalidInput(f"attention_scale = {self.attention_scale} is not a positive number")
        if self.sliding_window and not self.is_causal:
            raise InvalidInput("a sliding window looks back, and a bidirectional model looks both ways")

    @property
    def scale(self) -> float:
        """The factor of the scores: of the whole head, whatever part of it a device holds."""
        return 1 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    @property
    def rotated_dim(self) -> int:
        """Leading channels of a head that rotary positions turn; 0 where positions are learned."""
        return 0 if self.positions != "rotary" else self.rotary_dim or self.head_dim

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees, itself included; 0 means all before it."""
        return 0 if layer in self.full_attention_layers else self.sliding_window

    def rope(self, layer: int) -> Rope:
        """The rotary positions of this layer."""
        if self.local_rope_theta and self.window(layer):
            return Rope(self.local_rope_theta, self.rotated_dim)
        return Rope(self.rope_theta, self.rotated_dim, self.rope_scaling)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of each half of a layer, by name: `norm` before it (or behind the sum), `post_norm` behind it."""
        return ("norm", "post_norm") if self.norm_placement == "both" else ("norm",)

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last layer: not where each layer ends with one."""
        return self.norm_placement != "post"

    @property
    def output_size(self) -> int:
        """Width of what the model gives for a token: logits, or without a head hidden states."""
        return self.vocab_size if self.head == "vocabulary" else self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, tied ones once."""
        h, q, kv, f = self.hidden_size, self.num_heads, self.num_kv_heads, self.mlp_hidden_size
        ups = 2 if self.gated_mlp else 1
        biases = {"qkv": self.head_dim * (q + 2 * kv), "o": h, "mlp": ups * f + h}
        norm = 2 * h if self.norm == "layer" else h
        layer = h * self.head_dim * (2 * q + 2 * kv) + (1 + ups) * h * f + 2 * len(self.norms) * norm
        layer += sum(biases[part] for part in self.linear_bias) + (2 * self.head_dim if self.qk_norm else 0)
        heads = 1 if self.head == "vocabulary" and not self.tied_embeddings else 0
        rows = self.vocab_size * (1 + heads) + self.token_types
        rows += self.max_positions if self.positions == "learned" else 0
        return self.num_layers * layer + rows * h + norm * (self.has_final_norm + self.embedding_norm)

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def model_from(fields: Mapping[str, Any]) -> ModelSpec:
    """The inverse of `ModelSpec.to_dict`, also of older versions: what is gone may be there if it was off, and no
    biases were `false`. Raises InvalidInput.
    """
    names = {field.name for field in dataclasses.fields(ModelSpec)}
    gone = [name for name, value in fields.items() if name not in names and value]
    if gone:
        raise InvalidInput(f"{', '.join(gone)}: no field of a model", legal=tuple(sorted(names)))
    kept = {name: value for name, value in fields.items() if name in names}
    if kept.get("linear_bias") is False:
        kept["linear_bias"] = ()
    return ModelSpec(**kept)


def named_models() -> dict[str, ModelSpec]:
    """The models of `data/models.toml`, by name."""
    text = resources.files("headgrid.spec").joinpath("models.toml").read_text(encoding="utf-8")
    return {name: ModelSpec(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def find_model(name: str) -> ModelSpec:
    """The named model. Raises InvalidInput that lists the known names."""
    models = named_models()
    if name not in models:
        raise InvalidInput(
            f"no model is named {name!r}, and there is no such folder",
            legal=tuple(models),
            command=f"headgrid layouts --model {next(iter(models))}",
        )
    return models[name]
