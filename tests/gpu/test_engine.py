"""The engine on one GPU, eager and as CUDA graphs, against the reference."""

import pytest
import torch

from headgrid.layout.layout import Layout
from headgrid.layout.memory import cache_shape
from headgrid.layout.shards import parameters
from headgrid.reference import Reference, relative_error
from headgrid.runtime.cache import new_arena
from headgrid.runtime.engine import Engine
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.runtime.stage import load
from headgrid.runtime.weights import draw
from headgrid.spec.model import find_model
from headgrid.spec.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.mark.parametrize("name", ["seed-small", "tiny"])
def test_graph_and_eager_decode_agree_with_the_reference(name: str) -> None:
    model, layout, device = find_model(name), Layout(), torch.device("cuda")
    workload = Workload(batch=3, seq=70, decode_steps=5, dtype="float16")

    def get(tensor: str, shard: object) -> torch.Tensor:
        return draw(model, 0, tensor, shard, dtype=torch.float16, device=device)  # type: ignore[arg-type]

    arena = new_arena(cache_shape(model, layout, workload, 0).elements, torch.float16, device)
    engine = Engine(model, layout, workload, Mesh(layout, GroupPool(0)), load(model, layout, 0, get), arena)
    prompts = torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(1))
    shards = parameters(model, layout, 0)
    reference, floor = (
        Reference(model, lambda t: draw(model, 0, t, shards[t], dtype=torch.float16), dtype, device)
        for dtype in (torch.float64, torch.float16)
    )
    for graphs in (False, True):
        if graphs:
            engine.capture()
        engine.prefill(prompts)
        first = engine.tokens.clone()
        decoded = engine.decode(5, keep_logits=True)
        inputs = torch.cat([prompts.cuda(), first[:, None], decoded.tokens.T[:, :-1]], dim=1)
        truth, noise = (which.logits(inputs, 5) for which in (reference, floor))
        assert decoded.logits is not None
        error = relative_error(decoded.logits.transpose(0, 1), truth)
        assert error <= 1.5 * relative_error(noise, truth)
        assert relative_error(decoded.logits.transpose(0, 1).roll(1, 1), truth) > 0.1
