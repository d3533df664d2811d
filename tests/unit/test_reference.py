"""The oracle against transformers: GPT-2 as a whole, Llama's rotary positions and grouped attention."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from headgrid.reference import Reference, relative_error
from headgrid.spec.model import ModelSpec

HEADS, WIDTH, BATCH, SEQ = 4, 48, 3, 20
BOUNDS = [(torch.float32, 2e-6), (torch.float64, 1e-12)]
dtypes = pytest.mark.parametrize(("dtype", "bound"), BOUNDS, ids=["fp32", "fp64"])

GPT2 = ModelSpec(
    name="gpt2-small-random",
    num_layers=3,
    hidden_size=WIDTH,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=WIDTH // HEADS,
    mlp_hidden_size=4 * WIDTH,
    vocab_size=97,
    max_positions=32,
    positions="learned",
    activation="gelu_tanh",
    linear_bias=("qkv", "o", "mlp"),
    tied_embeddings=True,
)


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    """GPT-2 with weights far from its own initialisation, under which attention is uniform and all biases are zero."""
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=HEADS, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(gpt2: GPT2LMHeadModel) -> dict[str, Tensor]:
    """GPT-2's tensors under our names: its Conv1D keeps [in, out], and Q, K and V side by side."""
    state = {name.removeprefix("transformer."): tensor.detach() for name, tensor in gpt2.named_parameters()}
    ours = {"embedding.weight": state["wte.weight"], "positions.weight": state["wpe.weight"]}
    pairs = {"attention.norm": "ln_1", "mlp.norm": "ln_2"}
    linears = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        ours[f"final.norm.{kind}"] = state[f"ln_f.{kind}"]
        for layer in range(GPT2.num_layers):
            ours |= {f"layers.{layer}.{our}.{kind}": state[f"h.{layer}.{name}.{kind}"] for our, name in pairs.items()}
            ours |= {
                f"layers.{layer}.{our}.{kind}": state[f"h.{layer}.{name}.{kind}"].t() for our, name in linears.items()
            }
            fused = state[f"h.{layer}.attn.c_attn.{kind}"].split(WIDTH, dim=-1)
            ours |= {f"layers.{layer}.attention.{p}.{kind}": x.t() for p, x in zip("qkv", fused, strict=True)}
    return ours


def tokens() -> Tensor:
    return torch.randint(0, GPT2.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def truth(gpt2: GPT2LMHeadModel, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        logits = gpt2.to(dtype)(tokens()).logits
    gpt2.to(torch.float32)
    return logits


def error(gpt2: GPT2LMHeadModel, dtype: torch.dtype, spec: ModelSpec = GPT2, alter: Callable | None = None) -> float:
    weights = weights_of(gpt2)
    if alter is not None:
        alter(weights)
    ours = Reference(spec, weights.__getitem__, dtype).logits(tokens(), SEQ)
    return relative_error(ours, truth(gpt2, dtype))


@dtypes
def test_logits_of_all_positions_are_those_of_gpt2(gpt2: GPT2LMHeadModel, dtype: torch.dtype, bound: float) -> None:
    assert error(gpt2, dtype) <= bound


def test_every_parameter_of_gpt2_is_read(gpt2: GPT2LMHeadModel) -> None:
    weights, read = weights_of(gpt2), set()

    def get(name: str) -> Tensor:
        read.add(name)
        return weights[name]

    Reference(GPT2, get, torch.float32).logits(tokens(), 1)
    assert read == set(weights)
    ours = {weights[name].untyped_storage().data_ptr() for name in read}
    assert ours == {parameter.untyped_storage().data_ptr() for parameter in gpt2.parameters()}


def test_the_last_positions_alone_are_the_end_of_all_positions(gpt2: GPT2LMHeadModel) -> None:
    reference = Reference(GPT2, weights_of(gpt2).__getitem__, torch.float64)
    assert relative_error(reference.logits(tokens(), 3), reference.logits(tokens(), SEQ)[:, -3:]) < 1e-14


def roll_heads(part: str) -> Callable[[dict[str, Tensor]], None]:
    def alter(weights: dict[str, Tensor]) -> None:
        name = f"layers.1.attention.{part}.weight"
        weights[name] = weights[name].roll(WIDTH // HEADS, 0)

    return alter


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def alter(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.zeros_like(weights[name])

    return alter


@pytest.mark.parametrize("alter", [*map(roll_heads, "qkv"), *(without(f"layers.2.attention.{p}.bias") for p in "qvo")])
def test_heads_in_another_order_and_missing_biases_are_noticed(gpt2: GPT2LMHeadModel, alter: Callable) -> None:
    """Not K's bias: softmax does not see it."""
    assert error(gpt2, torch.float32, alter=alter) > 1e-3


def test_the_other_gelu_is_noticed(gpt2: GPT2LMHeadModel) -> None:
    erf = ModelSpec(**GPT2.to_dict() | {"activation": "gelu"})  # type: ignore[arg-type]
    assert error(gpt2, torch.float32, erf) > 1e-5


# Llama: rotary positions in the rotate-half order, query heads that share KV heads.
LLAMA = ModelSpec(
    name="llama-attention",
    num_layers=1,
    hidden_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_hidden_size=8,
    vocab_size=8,
    max_positions=64,
    rope_theta=500.0,
)


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )


def angles(length: int, theta: float = 500.0) -> tuple[Tensor, Tensor]:
    """cos and sin [1, length, d] in fp64 as Llama lays them out: transformers itself computes them in fp32 only."""
    frequencies = theta ** (-torch.arange(0, LLAMA.head_dim, 2).double() / LLAMA.head_dim)
    turns = torch.arange(length).double()[:, None] * frequencies
    return tuple(f(torch.cat([turns, turns], dim=-1))[None] for f in (torch.cos, torch.sin))  # type: ignore[return-value]


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nothing(name: str) -> Tensor:
    raise AssertionError(f"{name} is not needed")


def test_angles_are_those_of_llama() -> None:
    x = torch.zeros(1, 64, LLAMA.head_dim)
    theirs = LlamaRotaryEmbedding(llama_config())(x, torch.arange(64)[None])
    for ours, their in zip(angles(64), theirs, strict=True):
        assert (ours - their).abs().max() < 1e-5


def test_one_head_is_rotated_as_llama_rotates_it() -> None:
    q, k = random(2, 64, 1, 10), random(2, 64, 1, 10, seed=3)
    rotate = Reference(LLAMA, nothing, torch.float64)._rotate
    theirs = apply_rotary_pos_emb(q, k, *angles(64), unsqueeze_dim=2)
    for ours, their in zip((rotate(q, LLAMA.rope(0)), rotate(k, LLAMA.rope(0))), theirs, strict=True):
        assert relative_error(ours, their) < 1e-13
    interleaved = torch.cat([q[..., ::2], q[..., 1::2]], dim=-1)
    assert relative_error(rotate(interleaved, LLAMA.rope(0)), theirs[0]) > 0.1, "another pairing of channels is noticed"


def test_grouped_attention_with_rotary_positions_is_that_of_llama() -> None:
    """To fp32 rounding: transformers' eager softmax is in fp32 whatever the inputs are."""
    dtype, bound = torch.float64, 5e-7
    theirs = LlamaAttention(llama_config(), layer_idx=0).to(dtype)
    shapes = {"q": (60, 48), "k": (20, 48), "v": (20, 48), "o": (48, 60)}
    weights = {f"layers.0.attention.{p}.weight": 0.4 * random(*shape, seed=ord(p)) for p, shape in shapes.items()}
    weights |= {"layers.0.attention.norm.weight": torch.ones(48), "layers.0.attention.norm.bias": torch.zeros(48)}
    with torch.no_grad():
        for part in shapes:
            getattr(theirs, f"{part}_proj").weight.copy_(weights[f"layers.0.attention.{part}.weight"])
        x = random(2, 30, 48).to(dtype)
        normed = torch.nn.functional.layer_norm(x, (48,), eps=LLAMA.norm_eps)
        mask = torch.full((30, 30), float("-inf"), dtype=dtype).triu(1)[None, None]
        turns = tuple(table.to(dtype) for table in angles(30))
        expected, _ = theirs(normed, position_embeddings=turns, attention_mask=mask)
    ours = Reference(LLAMA, weights.__getitem__, dtype)
    assert relative_error(ours.attention(0, x), expected) <= bound
    weights["layers.0.attention.k.weight"] = weights["layers.0.attention.k.weight"].roll(10, 0)
    assert relative_error(ours.attention(0, x), expected) > 0.1, "query heads at the wrong KV head are noticed"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_infinite(bad: float) -> None:
    assert relative_error(torch.tensor([1.0, bad]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**0.5)
