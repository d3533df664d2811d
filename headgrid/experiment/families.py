"""Families of layouts: a layout's notation with one size left out, which is whatever the number of ranks asks for."""

import math
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
        if ranks % self.fixed:
            return None
        left_out = self.left_out(ranks)
        degrees = "".join(f"{axis}{size}" for axis, size in self._sizes(ranks).items())
        return parse_layout(degrees + ":" + "+".join(option for option in self.options if option not in left_out))

    @property
    def fixed(self) -> int:
        """The product of the sizes that are written."""
        return math.prod(size or 1 for _, size in self.degrees)

    def left_out(self, ranks: int) -> tuple[str, ...]:
        """The options that `at` leaves out there, in the order written: the member is then a plainer layout."""
        sizes = self._sizes(ranks)
        shared = [size for axis, size in sizes.items() if axis in ("tp", "n", "m")]
        dropped = {*EXCHANGES, "gathered"} if sizes.get("m") == 1 else set()
        dropped |= {"sharded", "concat", "dp-attention"} if shared and max(shared) == 1 else set()
        if ranks == self.fixed:
            gathers = "gathered" in self.options and "gathered" not in dropped
            sharing = sizes.get("n", 1) if gathers else max(shared, default=1)
            dropped |= {"overlapped"} if sharing == 1 else set()
            dropped |= {"drained"} if sizes.get("pp", 1) == 1 else set()
        return tuple(option for option in self.options if option in dropped)

    def _sizes(self, ranks: int) -> dict[str, int]:
        return {axis: size or ranks // self.fixed for axis, size in self.degrees}


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
    grown = family.at(2 * family.fixed)  # raises where options contradict one another, at whatever size
    if useless := family.left_out(2 * family.fixed):
        raise InvalidLayout(
            f"{text!r}: {' and '.join(useless)} would mean nothing at any size",
            why=f"it would be run as a plainer layout, {grown} for one",
            legal=(degrees, *EXAMPLES),
        )
    return family
