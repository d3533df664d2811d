"""The engine on one GPU, eager and as CUDA graphs, against the reference."""

from dataclasses import replace

import pytest
import torch

from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.shards import parameters
from headgrid.reference import Reference, relative_error
from headgrid.runtime.cache import new_arena
from headgrid.runtime.engine import Engine
from headgrid.runtime.layer import load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


VARIANTS = {
    "as it is": {},
    "window": {"sliding_window": 20, "full_attention_layers": (1,)},
    "cap": {"attn_logit_softcapping": 5.0, "attention_scale": 0.3},
    "head norms": {"qk_norm": True, "linear_bias": ("qkv", "o", "mlp")},
    "partly rotary": {"positions": "rotary", "rotary_dim": 4},
    "llama": {"norm": "rms", "gated_mlp": True, "activation": "silu", "linear_bias": ("qkv",)},
    "gemma": {
        **{"norm": "rms", "norm_unit_offset": True, "norm_placement": "both", "gated_mlp": True, "qk_norm": True},
        **{"activation": "gelu_tanh", "tied_embeddings": True, "embedding_scale": 8.0, "final_logit_softcapping": 9.0},
        **{"sliding_window": 20, "full_attention_layers": (1,), "positions": "rotary", "local_rope_theta": 50.0},
    },
    "norms behind sums": {"norm_placement": "post", "embedding_norm": True, "token_types": 2, "activation": "relu"},
}
WORKLOADS = {"even": {}, "ragged, in chunks": {"prompt_lengths": (70, 1, 33), "chunk_positions": 32}}


@pytest.mark.parametrize("work", WORKLOADS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["seed-small", "tiny"])
def test_graph_and_eager_decode_agree_with_the_reference(name: str, variant: str, work: str) -> None:
    model, layout, device = replace(find_model(name), **VARIANTS[variant]), Layout(), torch.device("cuda")
    workload = Workload(batch=3, seq=70, decode_steps=5, dtype="float16", **WORKLOADS[work])

    def get(tensor: str, shard: object) -> torch.Tensor:
        return draw(model, 0, tensor, shard, dtype=torch.float16, device=device)  # type: ignore[arg-type]

    arena = new_arena(cache_shape(model, layout, workload, 0).elements, torch.float16, device)
    engine = Engine(model, layout, workload, Mesh(layout, GroupPool(0)), load(model, layout, 0, get), arena)
    prompts = torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(1))
    shards = parameters(model, layout, 0)
    models = [
        Reference(model, lambda t: draw(model, 0, t, shards[t], dtype=torch.float16), dtype, device)
        for dtype in (torch.float64, torch.float16)
    ]
    for graphs in (False, True):
        if graphs:
            engine.capture()
        engine.prefill(prompts)
        logits = [engine.logits.clone()[None]]
        tokens = [engine.tokens.clone()[None]]
        decoded = engine.decode(5, keep_logits=True)
        assert decoded.logits is not None
        logits, tokens = torch.cat([*logits, decoded.logits]), torch.cat([*tokens, decoded.tokens])
        truth, noise = (_logits(which, prompts, workload, tokens) for which in models)
        assert relative_error(logits, truth) <= 1.5 * relative_error(noise, truth)
        assert relative_error(logits.roll(1, 1), truth) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_encoder_gives_every_token_s_states(dtype: str) -> None:
    changes = {"norm_placement": "post", "embedding_norm": True, "token_types": 2, "is_causal": False, "head": "none"}
    model, layout, device = replace(find_model("seed-small"), **changes), Layout(), torch.device("cuda")
    lengths, kind = (70, 5, 33), getattr(torch, dtype)
    workload = Workload(batch=3, seq=70, decode_steps=0, dtype=dtype, prompt_lengths=lengths, every_token=True)  # type: ignore[arg-type]
    shards = parameters(model, layout, 0)

    def get(tensor: str, shard: object = None) -> torch.Tensor:
        return draw(model, 0, tensor, shard or shards[tensor], dtype=kind, device=device)  # type: ignore[arg-type]

    arena = new_arena(cache_shape(model, layout, workload, 0).elements, kind, device)
    engine = Engine(model, layout, workload, Mesh(layout, GroupPool(0)), load(model, layout, 0, get), arena)
    prompts = torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(1))
    engine.prefill(prompts)
    found = torch.cat([engine.logits[i, :length] for i, length in enumerate(lengths)])
    truth, noise = (
        torch.cat(
            [Reference(model, get, d, device).logits(prompts[i : i + 1, :n], n)[0] for i, n in enumerate(lengths)]
        )
        for d in (torch.float64, kind)
    )
    assert relative_error(found, truth) <= 1.5 * relative_error(noise, truth)
    assert relative_error(found.roll(1, 0), truth) > 0.1


def _logits(model: Reference, prompts: torch.Tensor, workload: Workload, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1 + steps, rows, vocab] of each prompt at its own length, followed by the tokens [1 + steps, rows]."""
    rows = [
        model.logits(torch.cat([prompts[i, :length].cuda(), tokens[:-1, i]])[None], len(tokens))[0]
        for i, length in enumerate(workload.lengths)
    ]
    return torch.stack(rows, dim=1)
