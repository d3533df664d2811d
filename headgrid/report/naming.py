"""What arms are called beside their figures: an arm with FP8 linears never without its error."""

from collections.abc import Mapping
from typing import Any

from headgrid.report import format as fmt


def named(arm: Mapping[str, Any], gap: str = " ") -> str:
    """The label of an arm of a summary, with its error behind a `gap` where it has FP8 linears."""
    fp8 = arm.get("fp8")
    if fp8 is None:
        return arm["label"]
    error, ratio = fmt.percent(arm["relative_error"]), fmt.significant(fp8["error_ratio"], 2)
    return f"{arm['label']}{gap}(error {error}, {ratio} {fmt.TIMES} {fp8['against']}'s)"


def names(summary: Mapping[str, Any], gap: str = " ") -> dict[str, str]:
    """`named` by label."""
    return {arm["label"]: named(arm, gap) for arm in summary["arms"]}


def caution(summary: Mapping[str, Any]) -> str:
    """A sentence for figures whose labels have no room: which arms are less exact, and how much; or nothing."""
    listed = [named(arm) for arm in summary["arms"] if arm.get("fp8") is not None]
    return f" Linears in FP8: {'; '.join(listed)}." if listed else ""
