"""The oracle against transformers: each variant of attention as the family that has it computes it.

Families whose norms and MLPs differ from ours (RMS norms, gates) are run whole, with their own masks, and the attention
half of every layer is compared on the input that it had there. GPT-NeoX is compared as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralModel,
    PhiConfig,
    PhiModel,
    Qwen3Config,
    Qwen3Model,
)

from headgrid.reference import Reference, relative_error
from headgrid.spec.model import BIASES, ModelSpec

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, SEQ, THETA = 48, 6, 2, 12, 3, 21, 500.0
EXACT, SINGLE = 1e-12, 1e-6
"""Bounds in fp64: some families compute their softmax or their norms in fp32 whatever the inputs are."""
NOTICED = 1e-3
BASE = ModelSpec(
    name="variant",
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    mlp_hidden_size=64,
    vocab_size=37,
    max_positions=SEQ,
    rope_theta=THETA,
)
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 64,
    "vocab_size": 37,
    "max_position_embeddings": SEQ,
}
ROTARY = {"rope_type": "default", "rope_theta": THETA}


class Angles(nn.Module):
    """cos and sin [1, s, r] in fp64, laid out as rotate-half wants them; transformers has them in fp32 only."""

    def __init__(self, turned: int) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, x: Tensor, position_ids: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        frequencies = THETA ** (-torch.arange(0, self.turned, 2).double() / self.turned)
        turns = position_ids[0].double()[:, None] * frequencies
        both = torch.cat([turns, turns], dim=-1)[None]
        return torch.cos(both), torch.sin(both)


class Half(Reference):
    """Attention halves on inputs that are normed already."""

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x


@dataclass(frozen=True)
class Family:
    """A model of transformers and the same choices in our words, with choices that must be noticed."""

    name: str
    build: Callable[[], nn.Module]
    spec: ModelSpec
    bound: float
    wrong: tuple[dict, ...]


def _rotated(kind: type, config: type, spec: ModelSpec, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        rope = ROTARY | ({"partial_rotary_factor": spec.rotary_dim / HEAD_DIM} if spec.rotary_dim else {})
        found = kind(config(**SIZES | {"rope_parameters": rope} | options))
        found.rotary_emb = Angles(spec.rotated_dim)
        return found

    return build


def _family(
    name: str, kind: type, config: type, changes: dict, bound: float, wrong: tuple, **options: object
) -> Family:
    spec = replace(BASE, name=name, **changes)
    return Family(name, _rotated(kind, config, spec, **options), spec, bound, wrong)


SDPA, EAGER = {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}
GEMMA = {
    "attention_scale": 20**-0.5,
    "attn_logit_softcapping": 3.0,
    "sliding_window": 5,
    "full_attention_layers": (1,),
}
FAMILIES = (
    _family(
        *("mistral", MistralModel, MistralConfig, {"sliding_window": 6}, EXACT),
        ({"sliding_window": 5}, {"sliding_window": 7}, {"sliding_window": 0}, {"full_attention_layers": (1,)}),
        **SDPA | {"head_dim": HEAD_DIM, "sliding_window": 6},
    ),
    _family(
        *("qwen3", Qwen3Model, Qwen3Config, {"qk_norm": True, "norm_eps": 1e-3}, SINGLE),
        ({"qk_norm": False}, {"norm_eps": 1e-1}),
        **SDPA | {"head_dim": HEAD_DIM, "rms_norm_eps": 1e-3},
    ),
    _family(
        *("gemma2", Gemma2Model, Gemma2Config, GEMMA, SINGLE),
        (
            *({"attn_logit_softcapping": 0.0}, {"attn_logit_softcapping": 4.0}, {"attention_scale": None}),
            *({"full_attention_layers": ()}, {"full_attention_layers": (0,)}, {"sliding_window": 4}),
        ),
        **EAGER | {"head_dim": HEAD_DIM, "sliding_window": 5, "query_pre_attn_scalar": 20},
        attn_logit_softcapping=3.0,
    ),
    _family(
        *("phi", PhiModel, PhiConfig, {"rotary_dim": 2, "linear_bias": ("qkv", "o", "mlp"), "head_dim": 8}, EXACT),
        ({"rotary_dim": 4}, {"rotary_dim": 0}, {"rotary_dim": 8}),
        **SDPA | {"rope_parameters": ROTARY | {"partial_rotary_factor": 0.25}},
    ),
)
BERT = replace(
    *(BASE,),
    name="bert",
    positions="learned",
    is_causal=False,
    linear_bias=BIASES,
    num_kv_heads=HEADS,
    head_dim=8,
)
EVERY = (
    *FAMILIES,
    Family(
        "bert",
        lambda: BertModel(BertConfig(**SIZES | SDPA), add_pooling_layer=False),
        BERT,
        EXACT,
        ({"is_causal": True}, {"positions": "rotary"}, {"attention_scale": 0.3}),
    ),
)
families = pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)


def scatter(model: nn.Module) -> nn.Module:
    """Weights far from their initialisation, under which attention is almost uniform and all biases are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "dense": "o",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
}
NAMES |= {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}


def _attentions(model: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Of each layer: the attention with all its linears, what takes its input, and what gives its result."""
    if isinstance(model, BertModel):
        parts = [layer.attention for layer in model.encoder.layer]
        return [(part, part.self, part.output.dense) for part in parts]
    return [(layer.self_attn, layer.self_attn, layer.self_attn) for layer in model.layers]


@dataclass
class Seen:
    """What went into and came out of each layer's attention, and the weights under our names."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    weights: dict[str, Tensor]


@torch.no_grad()
def run(family: Family) -> Seen:
    model = scatter(family.build())
    seen = Seen([], [], {})

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.inputs.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def keep_output(module: nn.Module, args: tuple, result: object) -> None:
        seen.outputs.append(result[0] if isinstance(result, tuple) else result)  # type: ignore[arg-type]

    for layer, (whole, entry, end) in enumerate(_attentions(model)):
        entry.register_forward_pre_hook(keep_input, with_kwargs=True)
        end.register_forward_hook(keep_output)
        for name, parameter in whole.named_parameters():
            stem, _, kind = name.rpartition(".")
            if stem in NAMES:
                seen.weights[f"layers.{layer}.attention.{NAMES[stem]}.{kind}"] = parameter
    model(inputs_embeds=torch.randn(2, SEQ, HIDDEN, generator=torch.Generator().manual_seed(1)).double())
    return seen


def errors(seen: Seen, spec: ModelSpec) -> Iterator[float]:
    """Of every layer's attention half."""
    ours = Half(spec, seen.weights.__getitem__, torch.float64)
    for layer, (x, expected) in enumerate(zip(seen.inputs, seen.outputs, strict=True)):
        with torch.no_grad():
            yield relative_error(ours.attention(layer, x), expected)


@families
def test_attention_of_every_layer_is_that_of_the_family(family: Family) -> None:
    seen = run(family)
    assert len(seen.outputs) == LAYERS
    assert max(errors(seen, family.spec)) <= family.bound


@families
def test_another_choice_is_noticed(family: Family) -> None:
    seen = run(family)
    for change in family.wrong:
        assert max(errors(seen, replace(family.spec, **change))) > NOTICED, change


# GPT-NeoX with its halves one after the other is our model as a whole, with partial rotary positions.
NEOX = replace(BASE, name="gpt-neox", num_kv_heads=HEADS, head_dim=8, rotary_dim=4, linear_bias=BIASES, norm_eps=1e-4)


def neox() -> GPTNeoXForCausalLM:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    rope = ROTARY | {"partial_rotary_factor": 0.5}
    options = {"use_parallel_residual": False, "layer_norm_eps": 1e-4, "attn_implementation": "sdpa"}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, rope_parameters=rope, **options))  # type: ignore[arg-type]
    model.gpt_neox.rotary_emb = Angles(NEOX.rotated_dim)
    return scatter(model)  # type: ignore[return-value]


def neox_weights(model: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    """Under our names: GPT-NeoX keeps Q, K and V of each head together."""
    state = {name.removeprefix("gpt_neox."): tensor.detach() for name, tensor in model.named_parameters()}
    ours = {"embedding.weight": state["embed_in.weight"], "head.weight": model.get_output_embeddings().weight.detach()}
    pairs = {
        "attention.norm": "input_layernorm",
        "mlp.norm": "post_attention_layernorm",
        "attention.o": "attention.dense",
    }
    pairs |= {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    for kind in ("weight", "bias"):
        ours[f"final.norm.{kind}"] = state[f"final_layer_norm.{kind}"]
        for layer in range(LAYERS):
            ours |= {
                f"layers.{layer}.{our}.{kind}": state[f"layers.{layer}.{name}.{kind}"] for our, name in pairs.items()
            }
            fused = state[f"layers.{layer}.attention.query_key_value.{kind}"].unflatten(0, (HEADS, 3, -1))
            ours |= {f"layers.{layer}.attention.{p}.{kind}": fused[:, k].flatten(0, 1) for k, p in enumerate("qkv")}
    return ours


@torch.no_grad()
def test_logits_of_all_positions_are_those_of_gpt_neox() -> None:
    model = neox()
    tokens = torch.randint(0, 37, (3, SEQ), generator=torch.Generator().manual_seed(1))
    expected, weights = model(tokens).logits, neox_weights(model)

    def error(spec: ModelSpec) -> float:
        return relative_error(Reference(spec, weights.__getitem__, torch.float64).logits(tokens, SEQ), expected)

    assert error(NEOX) <= EXACT
    for change in (
        {"rotary_dim": 0},
        {"rotary_dim": 2},
        {"rope_theta": 600.0},
        {"norm_eps": 1e-2},
        {"is_causal": False},
    ):
        assert error(replace(NEOX, **change)) > NOTICED, change


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [family for family in EVERY if family.name in ("mistral", "gemma2", "qwen3", "bert")]
)
def test_16_bit_attention_is_the_same_function(family: Family) -> None:
    """The path by torch's fused attention, which is the noise floor of 16-bit runs."""
    seen = run(family)
    ours = Half(family.spec, seen.weights.__getitem__, torch.bfloat16)
    wrong = Half(replace(family.spec, **family.wrong[0]), seen.weights.__getitem__, torch.bfloat16)
    for layer, (x, expected) in enumerate(zip(seen.inputs, seen.outputs, strict=True)):
        assert relative_error(ours.attention(layer, x.bfloat16()), expected) < 0.03
    x, expected = seen.inputs[0].bfloat16(), seen.outputs[0]
    assert relative_error(wrong.attention(0, x), expected) > 0.05
