"""Families of layouts: a layout's notation with one size left out, which is whatever the number of ranks asks for."""

import re
from dataclasses import dataclass

from headgrid.errors import InvalidLayout
from headgrid.layout.layout import EXCHANGES, Layout, parse_layout

EXAMPLES = ("tp", "dp", "tppp2", "n1m:batch", "n2m:sequence+sharded", "nm2:gather")


@dataclass(frozen=True, slots=True)
class Family:
    """`degrees` are axes with their sizes in the order written, one of them None; `options` as layouts write them."""

    text: str
    degrees: tuple[tuple[str, int | None], ...]
    options: tuple[str, ...]

    def __str__(self) -> str:
        """As it was written."""
        return self.text

    def at(self, ranks: int) -> Layout | None:
        """The member on so many ranks; None where the sizes that are written do not divide them.

        An option without a meaning at that size is left out: one slice needs no exchange and gathers no weights, one
        rank has nobody to share a residual, an output or an MLP with and nothing to overlap, and one stage is no
        pipeline to be drained. So `n1m:batch` on one rank is the plain model, as `tp` is. Raises InvalidLayout for
        options that do not go together.
        """
        fixed = 1
        for _, size in self.degrees:
            fixed *= size or 1
        if ranks % fixed:
            return None
        sizes = {axis: size or ranks // fixed for axis, size in self.degrees}
        shared = [size for axis, size in sizes.items() if axis in ("tp", "n", "m")]
        dropped = {*EXCHANGES, "gathered"} if sizes.get("m") == 1 else set()
        dropped |= {"sharded", "concat", "dp-attention"} if shared and max(shared) == 1 else set()
        if ranks == fixed:
            gathers = "gathered" in self.options and "gathered" not in dropped
            sharing = sizes.get("n", 1) if gathers else max(shared, default=1)
            dropped |= {"overlapped"} if sharing == 1 else set()
            dropped |= {"drained"} if sizes.get("pp", 1) == 1 else set()
        degrees = "".join(f"{axis}{size}" for axis, size in sizes.items())
        return parse_layout(degrees + ":" + "+".join(option for option in self.options if option not in dropped))


def parse_family(text: str) -> Family:
    """The family that `text` names: exactly one size is left out. Raises InvalidLayout that shows examples."""
    degrees, _, options = text.strip().partition(":")
    found = re.findall(r"(dp|pp|tp|n|m)([1-9][0-9]{0,5})?", degrees)
    sizes = tuple((axis, int(size) if size else None) for axis, size in found)
    if not found or "".join(axis + size for axis, size in found) != degrees:
        raise InvalidLayout(
            f"{text!r} is not a family of layouts", why="write axes, then : and options", legal=EXAMPLES
        )
    grow = [axis for axis, size in sizes if size is None]
    if len(grow) != 1:
        raise InvalidLayout(
            f"{text!r} leaves {len(grow)} sizes out, and a family leaves out one",
            why="the axis without a number is the one that grows with the ranks",
            legal=EXAMPLES,
        )
    family = Family(text.strip(), sizes, tuple(filter(None, options.split("+"))))
    fixed = 1
    for _, size in sizes:
        fixed *= size or 1
    family.at(2 * fixed)  # raises where options contradict one another, at whatever size
    return family
