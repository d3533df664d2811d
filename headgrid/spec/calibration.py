"""What one machine was measured to reach: rates of its devices and costs of its collectives, as a frozen value.

`headgrid calibrate` writes it; shares of ceilings, checks and predictions read it. Data-sheet ceilings are in
`hardware`. SI units: bytes, seconds, operations (a multiplication and an addition are two).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from headgrid.errors import InvalidInput

SCHEMA = 1
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure of one device while all of them do the same, in the unit that its field names.

    `median` over ranks of each rank's median over the windows at the end, when clocks have settled; `low` and `high`
    are the extremes of those windows over all ranks and `n` is their number. `best` is the most favourable of all
    windows, the first ones on cool devices included. `settled`: on no rank did the last windows still drift.
    """

    median: float
    low: float
    high: float
    best: float
    n: int
    settled: bool
    per_rank: tuple[float, ...]
    """Medians."""
    sm_clock_mhz: tuple[float, ...] | None = None
    """Of each rank's GPU at the end; None where none answered."""
    power_w: tuple[float, ...] | None = None
    """The same, as the driver averages it."""

    def __post_init__(self) -> None:
        """Raise InvalidInput for what no measurement gives."""
        for name in ("per_rank", "sm_clock_mhz", "power_w"):  # JSON has lists only
            value: Any = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        for name in ("median", "low", "high", "best"):
            _positive(name, getattr(self, name))
        if not self.low <= self.median <= self.high or self.n < 1 or not self.per_rank:
            raise InvalidInput(
                f"a median of {self.median:g} between {self.low:g} and {self.high:g}, of {self.n} windows"
            )

    @property
    def spread(self) -> float:
        """Half the range of the windows that count, over the median."""
        return (self.high - self.low) / (2 * self.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A product (rows, inner size, columns) or causal attention (heads, positions, head dim) and its rate."""

    dtype: str
    shape: tuple[int, int, int]
    flop_per_s: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Messages of one size: `size_bytes` that a rank sends in a call (what `layout.traffic` counts); its time."""

    size_bytes: int
    median_s: float
    low_s: float
    high_s: float
    n: int

    def __post_init__(self) -> None:
        """Raise InvalidInput for what no measurement gives."""
        for name in ("size_bytes", "median_s", "low_s", "high_s", "n"):
            _positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of a collective of `ranks` ranks as alpha + bytes / beta (Hockney 1994), fitted to `points`.

    `beta_bytes_per_s` is None where time did not grow with size, and intervals (95 %) are None where the points do not
    bound the figure. The errors are those of the line at the points, relative to the time measured there.
    """

    kind: str
    ranks: int
    graphed: bool
    """Whether calls followed one another in a CUDA graph; else the host called each."""
    alpha_s: float
    alpha_ci95: tuple[float, float] | None
    beta_bytes_per_s: float | None
    beta_ci95: tuple[float, float] | None
    rms_relative_error: float
    worst_relative_error: float
    points: tuple[Point, ...]

    def time_s(self, size_bytes: float) -> float:
        """Seconds of one call in which each rank sends `size_bytes`. Raises InvalidInput for less than none."""
        if not size_bytes >= 0:
            raise InvalidInput(f"{size_bytes} bytes are no message")
        return self.alpha_s + (size_bytes / self.beta_bytes_per_s if self.beta_bytes_per_s else 0.0)

    @property
    def best_bytes_per_s(self) -> float:
        """The most that a rank was measured to send in a second."""
        return max(point.size_bytes / point.median_s for point in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All figures of one machine; all its ranks worked at the same time for each."""

    created: str
    headgrid_version: str
    device: str
    """cpu or cuda."""
    device_name: str
    ranks: int
    seconds: float
    """For which each rate was sustained."""
    cache_bytes: int | None
    """The last cache in front of a device's memory (a host's, of a CPU): what fits it is not read from memory."""
    environment: Mapping[str, Any] = field(hash=False)
    products: tuple[Kernel, ...]
    attention: tuple[Kernel, ...]
    copy_bytes_per_s: Measured
    """Read and written bytes together."""
    read_bytes_per_s: Measured
    launch_s: Measured
    """From one small kernel that the host starts to the next."""
    graph_launch_s: Measured | None
    """From one small kernel of a CUDA graph to the next."""
    spin_per_s: Measured
    """Turns of an empty loop of the host's interpreter."""
    collectives: tuple[Cost, ...]

    def product(self, dtype: str) -> Kernel:
        """The product of the shape that is fastest in this dtype. Raises InvalidInput if none was measured."""
        return _fastest(self.products, dtype, "products")

    def attend(self, dtype: str) -> Kernel:
        """Attention in this dtype. Raises InvalidInput if it was not measured."""
        return _fastest(self.attention, dtype, "attention")

    def cost(self, kind: str, ranks: int) -> Cost | None:
        """Of a collective among so many ranks; None if it was not measured."""
        return next((cost for cost in self.collectives if (cost.kind, cost.ranks) == (kind, ranks)), None)

    @property
    def link_bytes_per_s(self) -> float | None:
        """The most that a rank was measured to send in any collective but all-reduce, whose bytes are counted as a
        ring's, which a switch that reduces need not send; None for a single rank.
        """
        return max((cost.best_bytes_per_s for cost in self.collectives if cost.kind != "all_reduce"), default=None)

    @property
    def settled(self) -> bool:
        """Whether all sustained rates that ceilings are made of had settled."""
        kernels = [kernel.flop_per_s for kernel in (*self.products, *self.attention)]
        return all(each.settled for each in (*kernels, self.copy_bytes_per_s, self.read_bytes_per_s))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its hash and the environment's."""
        flat = json.loads(json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False))
        flat["environment_sha256"] = _sha256(flat["environment"])
        return flat | {"sha256": _sha256(flat)}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidInput(f"{name} = {value!r} is not a positive number")


def _fastest(kernels: tuple[Kernel, ...], dtype: str, what: str) -> Kernel:
    found = [kernel for kernel in kernels if kernel.dtype == dtype]
    if not found:
        raise InvalidInput(
            f"the calibration has no {what} in {dtype}", legal=tuple(dict.fromkeys(kernel.dtype for kernel in kernels))
        )
    return max(found, key=lambda kernel: kernel.flop_per_s.median)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file of `headgrid calibrate`. Raises InvalidInput for anything else, and for one that was
    changed after it was written.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read a calibration from {path}", why=str(error), command=_COMMAND) from error
    try:
        return from_dict(data)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error.what}", why=error.why, legal=error.legal, command=_COMMAND) from error


_COMMAND = "headgrid calibrate --out FILE"


def from_dict(data: Any) -> Calibration:
    """The inverse of `Calibration.to_dict`. Raises InvalidInput for other schemas, fields, figures and hashes."""
    document = cast(dict[str, Any], data if isinstance(data, dict) else {})
    if document.get("schema") != SCHEMA:
        raise InvalidInput(f"this is no calibration of schema {SCHEMA}")
    flat = {key: value for key, value in document.items() if key != "sha256"}
    if _sha256(flat) != document.get("sha256"):
        raise InvalidInput("the calibration does not have the hash it states: it was changed after it was written")
    return calibration_of({key: value for key, value in flat.items() if key not in ("schema", "environment_sha256")})


def calibration_of(own: dict[str, Any]) -> Calibration:
    """The value with these fields, in their JSON form. Raises InvalidInput if some are missing or of another kind."""
    try:
        return _calibration(dict(own))
    except InvalidInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput("a field of the calibration is missing or of another kind", why=repr(error)[:200]) from error


def _calibration(own: dict[str, Any]) -> Calibration:
    measured = ("copy_bytes_per_s", "read_bytes_per_s", "launch_s", "graph_launch_s", "spin_per_s")
    own |= {name: None if own[name] is None else _made(Measured, own[name]) for name in measured}
    own |= {name: tuple(_kernel(row) for row in own[name]) for name in ("products", "attention")}
    own["collectives"] = tuple(_cost(row) for row in own["collectives"])
    return _made(Calibration, own)


def _kernel(row: dict[str, Any]) -> Kernel:
    return _made(Kernel, row | {"shape": tuple(row["shape"]), "flop_per_s": _made(Measured, row["flop_per_s"])})


def _cost(row: dict[str, Any]) -> Cost:
    intervals = {name: None if row[name] is None else tuple(row[name]) for name in ("alpha_ci95", "beta_ci95")}
    if row["kind"] not in KINDS:
        raise InvalidInput(f"collective {row['kind']!r} is not known", legal=KINDS)
    return _made(Cost, row | intervals | {"points": tuple(_made(Point, point) for point in row["points"])})


_Made = TypeVar("_Made")


def _made(kind: type[_Made], row: dict[str, Any]) -> _Made:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if set(row) != known:
        raise InvalidInput(f"fields of {kind.__name__.lower()}: {', '.join(sorted(set(row) ^ known))}")
    return kind(**row)
