"""What the ranks of these tests do: every job in turn, each leaving what this rank found in a file."""

import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from adapter_models import build, prompts
from adapter_scenarios import GREEDY, SCENARIOS, StopAt
from torch import Tensor
from transformers import StoppingCriteriaList

import headgrid
from headgrid.errors import HeadgridError
from headgrid.runtime.mesh import GroupPool


def serve(rank: int, ranks: int, payload: dict[str, Any]) -> None:
    """`jobs` are (function of this module, arguments); what the k-th returns becomes `<folder>/<k>.<rank>.pt`."""
    pool = GroupPool(rank)
    for number, (name, arguments) in enumerate(payload["jobs"]):
        try:
            found = globals()[name](pool, **arguments)
        except Exception as error:
            block = error.block() if isinstance(error, HeadgridError) else traceback.format_exc()
            found = {"error": f"{type(error).__name__}: {block}"}
        part = Path(payload["folder"]) / f".{number}.{rank}"
        torch.save(found, part)
        part.rename(Path(payload["folder"]) / f"{number}.{rank}.pt")


def scenarios(pool: GroupPool, family: str, layout: str, names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """What each scenario finds with a sharded model, and its parameters on this rank."""
    model = headgrid.shard(build(family, **changes), layout, pool=pool)
    found: dict[str, Any] = {name: SCENARIOS[name](model) for name in names}
    return found | {"parameters": sum(x.numel() for x in model.parameters())}


def corrupted(pool: GroupPool, layout: str) -> dict[str, Any]:
    """Logits where the last rank's part of one matrix is 1 % off."""
    model = headgrid.shard(build("llama"), layout, pool=pool)
    if pool.rank == torch.distributed.get_world_size() - 1:
        model.get_parameter("shards.layers.1.attention.qkv.weight").mul_(1.01)
    return SCENARIOS["logits"](model)


def rounded(pool: GroupPool, layout: str) -> dict[str, Any]:
    """Logits in bf16."""
    return SCENARIOS["logits"](headgrid.shard(build("llama").bfloat16(), layout, pool=pool))


def own_seeds(pool: GroupPool, layout: str) -> dict[str, Any]:
    """Sampling where every rank has other random numbers."""
    model = headgrid.shard(build("llama"), layout, pool=pool)
    torch.manual_seed(7 + pool.rank)
    return {"tokens": model.generate(**prompts(), do_sample=True, max_new_tokens=8)}


def own_prompts(pool: GroupPool, layout: str) -> dict[str, Any]:
    """Every rank with another prompt: refused."""
    model = headgrid.shard(build("llama"), layout, pool=pool)
    return {"tokens": model.generate(**prompts(seed=pool.rank), **GREEDY)}


def own_criteria(pool: GroupPool, layout: str) -> dict[str, Any]:
    """Every rank with stopping criteria of its own."""
    model, batch = headgrid.shard(build("llama"), layout, pool=pool), prompts()
    stop = StopAt(batch["input_ids"].shape[1] + 3 + pool.rank)
    return {"tokens": model.generate(**batch, **GREEDY, stopping_criteria=StoppingCriteriaList([stop]))}


def cached(pool: GroupPool, layout: str, rows: int) -> dict[str, Any]:
    """The bytes of this rank's cache behind prompts of 20 tokens and 12 more."""
    model = headgrid.shard(build("llama"), layout, pool=pool)
    batch = prompts((20,) * rows)
    cache = model.generate(**batch, **GREEDY, return_dict_in_generate=True).past_key_values
    return {"bytes": cache.size_bytes, "room": cache.room}


def from_folder(pool: GroupPool, layout: str, folder: str) -> dict[str, Any]:
    """A model without weights, which are read from a folder, each rank its part."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    seen: list[tuple[int, int]] = []
    headgrid.shard(model, layout, pool=pool, checkpoint=folder, progress=lambda *bytes_of: seen.append(bytes_of))
    return SCENARIOS["greedy"](model) | {"progress": seen}


def tensor_parallel(pool: GroupPool, folder: str) -> dict[str, Any]:
    """transformers alone: its own tensor parallelism on these ranks."""
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=torch.distributed.get_world_size(), tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32)
    return SCENARIOS["logits"](model.eval())


def sharded(pool: GroupPool, folder: str, layout: str) -> dict[str, Tensor]:
    """The same folder as transformers loads it, sharded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    headgrid.shard(model, layout, pool=pool)
    assert heads == (model.config.num_attention_heads, model.config.num_key_value_heads)
    return {name: SCENARIOS[name](model) for name in ("logits", "greedy")}
