"""The transformer as a value: sizes and choices, nothing executable."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from headgrid.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only, pre-norm transformer. All sizes are global: no layout ever changes them.

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
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-5
    linear_bias: bool = False
    """Biases on every linear layer except the head (GPT-2 has them)."""
    tied_embeddings: bool = False
    is_causal: bool = True
    """False: every position attends to the whole sequence, as encoders do; such a model is not decoded."""
    rotary_dim: int = 0
    """Leading channels of a head that rotary positions turn (GPT-NeoX, Phi); 0 means all of them."""
    attention_scale: float | None = None
    """Factor of the scores; None means 1/sqrt(head_dim)."""
    attn_logit_softcapping: float = 0.0
    """Scores become cap x tanh(score / cap) (Gemma 2); 0 means they stay."""
    sliding_window: int = 0
    """Keys that a query sees, itself included (Mistral); 0 means all before it."""
    full_attention_every: int = 0
    """Every so many-th layer has no sliding window (2: Gemma 2, 6: Gemma 3); 0 means none is without."""
    qk_norm: bool = False
    """An RMS norm over each Q and each K head before rotary positions, with a weight of head_dim (Qwen 3)."""
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
        self._check_attention()

    def _check_attention(self) -> None:
        if self.rotated_dim % 2 or self.rotated_dim > self.head_dim:
            raise InvalidInput(
                f"rotary positions turn pairs of channels: {self.rotated_dim} of head_dim {self.head_dim} cannot be"
            )
        for field in ("rotary_dim", "sliding_window", "full_attention_every"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 0:
                what = f"{field} = {getattr(self, field)} is not a whole number from 0 on"
                raise InvalidInput(what, legal=("0 for none",))
        if not 0 <= self.attn_logit_softcapping < math.inf:
            raise InvalidInput(
                f"attn_logit_softcapping = {self.attn_logit_softcapping} is no cap", legal=("0 for none",)
            )
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
        full = self.full_attention_every and (layer + 1) % self.full_attention_every == 0
        return 0 if full else self.sliding_window

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, tied ones once."""
        h, q, kv, f = self.hidden_size, self.num_heads, self.num_kv_heads, self.mlp_hidden_size
        attention = h * self.head_dim * (2 * q + 2 * kv)
        biases = (self.head_dim * (q + 2 * kv) + h + f + h) if self.linear_bias else 0
        layer = attention + 2 * h * f + 4 * h + biases + (2 * self.head_dim if self.qk_norm else 0)
        tables = self.vocab_size * (1 if self.tied_embeddings else 2) + (
            self.max_positions if self.positions == "learned" else 0
        )
        return self.num_layers * layer + tables * h + 2 * h

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def named_models() -> dict[str, ModelSpec]:
    """The models of `data/models.toml`, by name."""
    text = resources.files("headgrid.spec").joinpath("models.toml").read_text(encoding="utf-8")
    return {name: ModelSpec(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def find_model(name: str) -> ModelSpec:
    """The named model. Raises InvalidInput that lists the known names."""
    models = named_models()
    if name not in models:
        raise InvalidInput(
            f"no model is named {name!r}", legal=tuple(models), command=f"headgrid layouts --model {next(iter(models))}"
        )
    return models[name]
