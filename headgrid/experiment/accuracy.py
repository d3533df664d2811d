"""What FP8 linears cost in accuracy: figures that stand beside all others of such an arm. No torch in here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import Layout, parse_layout

SINGLE_DEVICE = "one device"


def with_fp8(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arms of a summary, each with `fp8`: None, or of an arm with FP8 linears its relative error over that of the
    same layout without, `against`; where that is no arm of the run, of the plain model in the run's dtype.
    """
    layouts = [_parsed(arm["layout"]) for arm in arms]
    errors = dict(zip(reversed(layouts), (arm["relative_error"] for arm in reversed(arms)), strict=True))
    labels = dict(zip(reversed(layouts), (arm["label"] for arm in reversed(arms)), strict=True))
    found: list[dict[str, Any]] = []
    for arm, layout in zip(arms, layouts, strict=True):
        fp8 = None
        if layout is not None and layout.linears == "fp8":
            plain = replace(layout, linears="model")
            other = errors.get(plain)
            against = labels[plain] if other is not None else SINGLE_DEVICE
            other = other if other is not None else _floor(arm["verify"])
            error = arm["relative_error"]
            fp8 = {"against": against, "error_ratio": error / other if error is not None and other else None}
        found.append({**arm, "fp8": fp8})
    return found


def _parsed(text: str) -> Layout | None:
    """The layout; None for what a later version may have written."""
    try:
        return parse_layout(text)
    except InvalidLayout:
        return None


def _floor(check: Mapping[str, Any] | None) -> float | None:
    """The largest error of the plain model without FP8 linears, as the last check of an arm has it."""
    floors = [phase.get("unquantised_floor") for phase in (check or {"phases": {}})["phases"].values()]
    return max((floor for floor in floors if floor is not None), default=None)
