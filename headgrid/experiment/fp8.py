"""Can these GPUs multiply FP8, and in the sizes of these layouts? Asked before any process starts."""

from collections.abc import Sequence

from headgrid.errors import NotAvailable
from headgrid.experiment.design import Device
from headgrid.experiment.machine import compute_capabilities
from headgrid.layout.layout import Layout
from headgrid.layout.products import check_products
from headgrid.runtime.quantised import LEAST_CAPABILITY
from headgrid.spec.model import ModelSpec


def ensure(model: ModelSpec, layouts: Sequence[Layout], device: Device) -> None:
    """Raise NotAvailable for GPUs without FP8 products, InvalidLayout for a layout of sizes that they do not take.

    A CPU emulates FP8 products in any size.
    """
    if device == "cpu" or all(layout.linears == "model" for layout in layouts):
        return
    old = sorted(each for each in compute_capabilities() if each < LEAST_CAPABILITY)
    if old:
        raise NotAvailable(
            "a GPU of this host has no FP8 products",
            numbers=f"compute capability {old[0][0]}.{old[0][1]}, and {'.'.join(map(str, LEAST_CAPABILITY))} is needed",
            why="Ada and Hopper were the first to have them",
            legal=("layouts without fp8", "--device cpu, where they are emulated"),
        )
    for layout in layouts:
        check_products(model, layout)
