"""Ceilings of devices: data with units and sources, in `hardware.toml`."""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from headgrid.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The most that one device can do. Peaks are the maker's, dense; measured figures are None where there are none.

    Operations count a multiplication and an addition as two. `peak_link_bytes_per_s` is in one direction.
    """

    name: str
    names: tuple[str, ...]
    memory_bytes: int
    peak_memory_bytes_per_s: float
    peak_link_bytes_per_s: float
    peak_flop_per_s: dict[str, float]
    source: str
    measured_source: str = ""
    measured_matmul_flop_per_s: dict[str, float] = field(default_factory=dict[str, float])
    measured_attention_flop_per_s: dict[str, float] = field(default_factory=dict[str, float])
    measured_memory_bytes_per_s: float | None = None

    def flop_per_s(self, dtype: str) -> float:
        """Peak of matrix products in this dtype. Raises InvalidInput for one that the device has no figure for."""
        if dtype not in self.peak_flop_per_s:
            raise InvalidInput(f"no peak of {self.name} is known for {dtype}", legal=tuple(self.peak_flop_per_s))
        return self.peak_flop_per_s[dtype]


@cache
def known_hardware() -> dict[str, Hardware]:
    """The devices of `hardware.toml`, by name."""
    text = resources.files("headgrid.spec").joinpath("hardware.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = tomllib.loads(text)
    found: dict[str, Hardware] = {}
    for name, row in rows.items():
        fields: dict[str, Any] = {**row, "name": name, "names": tuple(row["names"])}
        found[name] = Hardware(**fields)
    return found


def find_hardware(name: str) -> Hardware:
    """The device of this name, or that the driver calls so. Raises InvalidInput that lists the known ones."""
    for each in known_hardware().values():
        if name == each.name or name in each.names:
            return each
    raise InvalidInput(f"the ceilings of {name!r} are not known", legal=tuple(known_hardware()))
