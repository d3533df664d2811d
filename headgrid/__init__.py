"""headgrid: exact attention on any number of GPUs, by n head groups x m slices of every head's channels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from headgrid.layout.layout import Layout
    from headgrid.models.model import Model

__version__ = "0.1.0"


def load(folder: "Path | str", layout: "Layout | str" = "tp1", **options: Any) -> "Model":
    """A checkpoint in Hugging Face format on the ranks of a layout: see `headgrid.models.model.load`."""
    from headgrid.models import model

    return model.load(folder, layout, **options)


def shard(model: "PreTrainedModel", layout: "Layout | str", **options: Any) -> "PreTrainedModel":
    """`model`, an already built transformers model, on the ranks of a layout: see `headgrid.models.adapter.shard`.

    Raises NotAvailable where transformers is not installed.
    """
    try:
        from headgrid.models import adapter
    except ModuleNotFoundError as error:
        from headgrid.errors import NotAvailable

        if error.name != "transformers":
            raise
        raise NotAvailable("transformers is not installed", command="pip install 'transformers>=5.17'") from error
    return adapter.shard(model, layout, **options)
