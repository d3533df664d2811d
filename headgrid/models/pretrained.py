"""A folder in Hugging Face format, opened and checked: what its model is, and where each of its tensors lies."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headgrid.errors import InvalidInput
from headgrid.layout.layout import Layout
from headgrid.layout.shards import parameters
from headgrid.models import stream
from headgrid.models.chunks import check_stored, stored_shapes
from headgrid.models.config import ModelConfig, read_spec
from headgrid.models.names import Source, check_left_over, copies, sources
from headgrid.models.safetensors import Checkpoint, open_checkpoint
from headgrid.models.stream import DTYPES, Progress
from headgrid.runtime.collectives import Axis
from headgrid.runtime.layer import Weights, allocate
from headgrid.runtime.quantised import all_as_kept
from headgrid.spec.model import ModelSpec, find_model, named_models


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A checkpoint whose tensors are those of its config.json. Weights are read when they are asked for."""

    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint
    sources: dict[str, Source]

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.config.spec

    @property
    def dtype(self) -> str:
        """The dtype that the weights are meant to have: as config.json says, or else as they are stored."""
        stored = self.checkpoint.tensors[self.sources["embedding.weight"].name].dtype
        return self.config.dtype or str(DTYPES[stored]).removeprefix("torch.")

    def whole(self, name: str) -> Tensor:
        """A whole tensor of the model by its global name, on the CPU in its stored dtype."""
        return stream.whole(self.checkpoint, self.sources, name, parameters(self.spec, Layout(), 0)[name].shape)

    def local(
        self,
        layout: Layout,
        axis: Axis,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        *,
        tp: Axis | None = None,
    ) -> Weights:
        """This rank's weights, read together with the other ranks of `axis`, all of which call this.

        With FP8 linears the ranks of `tp`, which share a layer, agree on scales when all is read: until then a rank
        holds its part in `dtype`. Raises InvalidInput on all of them if their hosts have different checkpoints.
        """
        self._ensure_same(axis, device)
        if not axis.index:
            self._check_copies()
        weights, views = allocate(self.spec, layout, axis.ranks[axis.index], dtype, device)
        stream.load(self.checkpoint, self.sources, self.spec, layout, axis, views, progress)
        del views  # each tensor is freed when it is rounded
        return all_as_kept(layout, weights, tp)

    def _ensure_same(self, axis: Axis, device: torch.device) -> None:
        """Ranks read parts for each other: of another checkpoint on another host they would make a mixture."""
        mine = torch.tensor([self.checkpoint.fingerprint()], dtype=torch.int64, device=device)
        found = axis.all_gather(mine, [1] * axis.size).tolist()
        odd = [rank for rank, each in zip(axis.ranks, found, strict=True) if each != found[0]]
        if odd:
            raise InvalidInput(
                f"ranks read different checkpoints in {self.folder}",
                numbers=f"ranks {', '.join(map(str, odd[:16]))} have another than rank {axis.ranks[0]}",
                why="the folder must hold the same files on every host",
            )

    def _check_copies(self) -> None:
        """Raise InvalidInput where a head is stored beside the embeddings that it should be tied to, and differs."""
        shape = parameters(self.spec, Layout(), 0)["embedding.weight"].shape
        for one, other in copies(self.sources, self.checkpoint.tensors):
            found = (stream.whole(self.checkpoint, {n: Source(n)}, n, shape) for n in (one, other))
            if not torch.equal(*found):
                raise InvalidInput(
                    f"{other} is stored, and is not {one}", why="config.json says that the two are tied: one tensor"
                )


def open_pretrained(folder: Path | str) -> Pretrained:
    """The checkpoint of a local folder: config.json, and model.safetensors or its index with the files that it names.

    Raises InvalidInput, before any weight is read, for whatever is not a model that we compute exactly.
    """
    return opened(Path(folder), read_spec(Path(folder)))


def opened(folder: Path, config: ModelConfig) -> Pretrained:
    """The checkpoint of a folder as that of a model whose config is known already. Raises as `open_pretrained`."""
    checkpoint = open_checkpoint(folder)
    found = sources(config.spec, config.family, checkpoint.tensors)
    check_left_over(config.family, found, checkpoint.tensors)
    check_stored(checkpoint.tensors, stored_shapes(config.spec, found))
    return Pretrained(folder, config, checkpoint, found)


def find_spec(name: str) -> tuple[ModelSpec, Path | None]:
    """The model of a name or of a folder; and the folder, if it is one. Raises InvalidInput that lists the names."""
    folder = Path(name)
    if name in named_models() or not folder.exists():
        return find_model(name), None
    pretrained = open_pretrained(folder)
    with pretrained.checkpoint:
        return pretrained.spec, folder
