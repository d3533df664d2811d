"""`headgrid.shard`: an already built transformers model on the ranks of a layout, each with its part of the weights.

transformers' own tensor parallelism cuts projections into rows without regard to heads, and fails where ranks do not
divide the KV heads. Here nothing is patched layer by layer: the model keeps its class, its config and its `generate`,
and its `forward` drives the stage of a layout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from headgrid.errors import InvalidInput, InvalidLayout
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, legal_layouts
from headgrid.layout.products import check_products
from headgrid.layout.shards import Shard
from headgrid.layout.span import Spans
from headgrid.models.config import ModelConfig, family_of, spec_from_config
from headgrid.models.driver import Driver
from headgrid.models.families import Family
from headgrid.models.names import Source, check_left_over, copies, sources
from headgrid.models.pretrained import opened
from headgrid.models.sharded_model import Sharded, ShardedCausalLM, ShardedEncoder
from headgrid.models.stream import Progress
from headgrid.runtime.layer import Weights, load
from headgrid.runtime.mesh import GroupPool, Mesh
from headgrid.spec.model import ModelSpec

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "bert": "BertModel",
}
"""Of each family the class whose `forward` is replaced: others compute something else."""


def shard(
    model: PreTrainedModel,
    layout: Layout | str,
    *,
    device: torch.device | str | None = None,
    pool: GroupPool | None = None,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """`model` itself, changed: of its weights only this rank's part is left, and `forward` and `generate` run on all
    ranks of `layout` together, exactly. Every rank calls this, and then the same methods with the same inputs.

    `layout` is one of n x m ranks, such as "n2m2:batch" or "tp4", as many as torch.distributed has (which must be
    initialised unless it is one). The part goes to `device`, by default this rank's GPU where the ranks talk through
    NCCL, else to where the model is. With `checkpoint`, a folder in Hugging Face format, the weights are read from
    there, by each rank its part, and those of `model` may be on the device "meta"; `progress` is then told how many
    bytes of how many are read. `pool` shares process groups with other models.

    Raises InvalidInput for a model that is not of a class of `CLASSES`, or whose config or weights are not
    understood, and InvalidLayout for a layout that cannot run it.
    """
    spec, family = _spec(model)
    layout = parse_layout(layout) if isinstance(layout, str) else layout
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _check_layout(spec, layout, ranks)
    device = torch.device(device) if device is not None else _default_device(model)
    if device.type == "cuda":
        check_products(spec, layout)
    mesh = Mesh(layout, pool or GroupPool(rank))
    if checkpoint is None:
        weights = _slices(spec, family, mesh, model.state_dict(), device)
    else:
        weights = _read(spec, family, mesh, Path(checkpoint), model.dtype, device, progress)
    return _replaced(model, Driver(spec, layout, mesh, weights))


def _spec(model: PreTrainedModel) -> tuple[ModelSpec, Family]:
    """The model as headgrid knows it, and its family."""
    if isinstance(model, Sharded):
        raise InvalidInput("the model is already sharded")
    config = model.config.to_dict()
    family = family_of(config)
    if type(model).__name__ != CLASSES[family] or not type(model).__module__.startswith("transformers."):
        raise InvalidInput(
            f"a model of class {type(model).__module__}.{type(model).__qualname__}",
            why="its forward may compute something else than that of transformers",
            legal=tuple(CLASSES.values()),
        )
    if "forward" in vars(model) or getattr(model, "_compiled_call_impl", None) is not None:
        raise InvalidInput(
            "the model's forward has been replaced or compiled",
            why="a sharded model has a forward of its own",
            legal=("shard before anything else is done", "from_pretrained without device_map"),
        )
    pooler = model._modules.get("pooler")
    if pooler is not None and any(x.device.type == "meta" for x in pooler.parameters()):
        raise InvalidInput("the pooler has no weights", legal=("BertModel(config, add_pooling_layer=False)",))
    return spec_from_config(config, model.config.name_or_path or family), family


def _check_layout(model: ModelSpec, layout: Layout, ranks: int) -> None:
    logits = "every rank needs all sequences' logits in every step, and exactly"
    reasons = {
        "pp > 1": (layout.pp > 1, logits),
        "dp > 1": (layout.dp > 1, logits),
        "gathered weights": (layout.weights == "gathered", "its cache is not that of gathered prefill"),
        "overlapped communication": (layout.communication == "overlapped", "it computes one call at a time"),
        "data-parallel attention": (layout.attention == "dp-attention", "rows come alone, and move from rank to rank"),
        "no exchange": (layout.exchange == "independent", logits),
    }
    for reason, (holds, why) in reasons.items():
        if holds:
            legal = [str(other) for other in legal_layouts(model, layout.ranks) if other.dp == other.pp == 1]
            raise InvalidLayout(
                f"{layout}: {reason} does not go with transformers' generate",
                why=why,
                legal=[text for text in legal if "gathered" not in text],
            )
    if ranks == 1 < layout.ranks and not dist.is_initialized():
        raise InvalidLayout(
            f"{layout} needs {layout.ranks} ranks, and torch.distributed is not initialised",
            why="each rank is a process, and joins the others before the model is sharded",
            legal=("torch.distributed.init_process_group()",),
            command=f"torchrun --nproc-per-node {layout.ranks} SCRIPT",
        )
    check(model, layout, ranks=ranks)


def _default_device(model: PreTrainedModel) -> torch.device:
    if model.device.type != "cuda" and dist.is_initialized() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _slices(model: ModelSpec, family: Family, mesh: Mesh, state: Mapping[str, Tensor], device: torch.device) -> Weights:
    """This rank's part of the weights of a model that is whole in memory."""
    found = sources(model, family, state.keys())
    check_left_over(family, found, state.keys())
    needed = {source.name: state[source.name] for source in found.values()}
    kinds = {(x.dtype, x.device.type == "meta") for x in needed.values()}
    if len(kinds) > 1 or True in (meta for _, meta in kinds):
        raise InvalidInput(
            "the model's weights are not there" if len(kinds) == 1 else "weights of several dtypes",
            numbers=", ".join(sorted({f"{x.dtype} on {x.device.type}" for x in needed.values()})),
            why="all are kept in one dtype",
            legal=("from_pretrained(..., dtype=torch.bfloat16)", "shard(..., checkpoint=FOLDER)"),
        )
    for one, other in copies(found, state.keys()):
        if not torch.equal(state[one], state[other]):
            raise InvalidInput(f"{one} and {other} differ", why="the config says that they are tied")

    def get(name: str, part: Shard) -> Tensor:
        return _part(needed[found[name].name], found[name], part).to(device)

    return load(model, mesh.layout, mesh.rank, get, mesh.tp)


def _part(stored: Tensor, source: Source, shard: Shard) -> Tensor:
    """A shard of a stored tensor, as a copy."""
    stored = stored.detach()
    stored = stored.t() if source.transposed and stored.dim() == 2 else stored
    rows = torch.cat([stored[span.start : span.stop] for span in _shifted(shard.rows, source.first_row)])
    if shard.cols is None:
        return rows
    return torch.cat([rows[:, span.start : span.stop] for span in shard.cols], dim=1)


def _shifted(spans: Spans, offset: int) -> Spans:
    return tuple(span.shift(offset) for span in spans)


def _read(
    model: ModelSpec,
    family: Family,
    mesh: Mesh,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Weights:
    """This rank's part of the weights of a checkpoint: all ranks read it together, each byte once."""
    pretrained = opened(folder, ModelConfig(model, family, None, ()))
    with pretrained.checkpoint:
        return pretrained.local(mesh.layout, mesh.tp, dtype, device, progress, tp=mesh.tp)


def _replaced(model: PreTrainedModel, driver: Driver) -> PreTrainedModel:
    """The model without its modules, of a class that is its own and drives the stage."""
    pooler = model._modules.get("pooler")
    model._modules.clear()
    if pooler is not None:
        model.add_module("pooler", pooler.to(driver.device).requires_grad_(False))
    model.add_module("shards", Shards(driver.weights))
    base = ShardedCausalLM if driver.model.head == "vocabulary" else ShardedEncoder
    own = type(model)
    own_names = {"__module__": __name__, "__doc__": own.__doc__, "_driver": driver}
    model.__class__ = type(f"Sharded{own.__name__}", (base, own), own_names)  # a class for this model alone
    return model.eval()


class Shards(nn.Module):
    """The weights of one rank as parameters, by headgrid's names, so that they are counted and found."""

    def __init__(self, weights: Weights) -> None:
        """The parameters share the memory of `weights`, and want no gradients."""
        super().__init__()
        for name, x in weights.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(x, requires_grad=False))

    def _apply(self, fn: Any, recurse: bool = True) -> "Shards":
        """What `to`, `half` and `cuda` call. Raises InvalidInput if they would move or convert the shards."""
        some = next(self.parameters())
        probe = fn(some.detach()[:0])
        if (probe.dtype, probe.device) != (some.dtype, some.device):
            raise InvalidInput(
                f"a sharded model stays where and as it is, {some.dtype} on {some.device}",
                why="the layout's stage holds the same tensors",
                legal=("convert the model, then shard it", "shard(..., device=DEVICE)"),
            )
        return self
