"""What a comparison will do, as a frozen value that is fixed, hashed and written before any rank starts."""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from headgrid import __version__
from headgrid.errors import InvalidInput, InvalidLayout
from headgrid.experiment.pilot import PilotRule, rule_of
from headgrid.experiment.text import Text
from headgrid.layout.batching import owned_rows
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check, divisors, is_legal
from headgrid.layout.span import balanced
from headgrid.spec.calibration import Calibration
from headgrid.spec.calibration import from_dict as calibration_from
from headgrid.spec.model import ModelSpec, model_from
from headgrid.spec.workload import Workload

Role = Literal["baseline", "aa", "planted", "arm"]
Device = Literal["cpu", "cuda"]

ANALYSIS = 3
"""How runs declared now are analysed: as with 2, and a pilot may set the length of blocks, and sentinels have them run
again. 2: blocks of one launch may depend on one another, several comparisons are held jointly, a planted slow-down and
sentinels ride along. 1: without any of that. So older runs were declared."""
MOST_PLANTED = 0.5
SENSITIVE = 0.10
"""A negative control that moves the logits by less proves nothing about a model, and then no arm is called verified."""
ENOUGH_TOKENS = 16
"""Of fewer tokens an error is chance: such a phase is judged with all the others."""


def allowed_multiple(dtype: str, ranks: int) -> float:
    """How far above the noise floor a layout's relative error may lie: 1.5, and 2 in 16 bits on more than 4 ranks."""
    return 2.0 if dtype in ("float16", "bfloat16") and ranks > 4 else 1.5


@dataclass(frozen=True, slots=True)
class Arm:
    """One layout under a label. The A/A arm is the baseline's layout, and engine, under another label. So is the
    planted one, but each of its ranks adds a known share to the time of its own work.
    """

    label: str
    layout: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How much is measured. Blocks are whole turns of all arms in random order; launches are fresh processes."""

    name: Literal["default", "seed"] = "default"
    launches: int = 1
    blocks: int = 8
    warmup_blocks: int = 1
    margin: float = 0.01
    seed: int = 0
    verify_sequences: int = 4
    planted: float = 0.02
    """Share by which the planted arm is slowed down; 0: there is no such arm."""
    pilot: PilotRule | None = None
    """How a pilot sets the turns of a block, and which blocks are run again; None: one turn a block, none again."""
    analysis: int = ANALYSIS

    def __post_init__(self) -> None:
        """Raise InvalidInput for counts that measure nothing."""
        for name, least in (("launches", 1), ("blocks", 1), ("warmup_blocks", 0), ("verify_sequences", 1)):
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} = {getattr(self, name)} is less than {least}")
        if not 0 <= self.planted <= MOST_PLANTED:
            raise InvalidInput(f"planted = {self.planted} is no share from 0 to {MOST_PLANTED}")


SEED_PROTOCOL = Protocol(name="seed", launches=1, blocks=1000, warmup_blocks=100)
"""The seed experiment's 100 warm-up and 1000 measured iterations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """All that decides what is run. `docs/run-folder.md` describes its JSON form."""

    name: str
    created: str
    headgrid_version: str
    model: ModelSpec
    workload: Workload
    arms: tuple[Arm, ...]
    control: str | None
    """The negative control; None on one rank, where no cut of the channels can be left without its exchange."""
    ranks: int
    device: Device
    text: Text
    protocol: Protocol
    order: tuple[tuple[tuple[int, ...], ...], ...]
    checkpoint: str | None = None
    """Folder of the weights; None: they are drawn."""
    calibration: Calibration | None = None
    """What the machine was measured to reach: figures are given as shares of it."""

    @property
    def backend(self) -> str:
        """torch's name of the communication library."""
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The distinct layouts, in the order of the arms."""
        return tuple(dict.fromkeys(parse_layout(arm.layout) for arm in self.arms))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its hash."""
        protocol = asdict(self.protocol)
        if self.protocol.analysis == 1:  # as it was declared, and hashed
            del protocol["analysis"], protocol["planted"]
        if self.protocol.analysis < 3:
            del protocol["pilot"]
        flat = {"schema": 1, "name": self.name, "created": self.created, "headgrid_version": self.headgrid_version}
        flat |= {
            "model": self.model.to_dict(),
            "workload": asdict(self.workload),
            "arms": [asdict(a) for a in self.arms],
        }
        flat |= {"control": self.control, "ranks": self.ranks, "device": self.device, "backend": self.backend}
        flat |= {"text": asdict(self.text), "protocol": protocol.pop("name"), **protocol}
        flat |= {"checkpoint": self.checkpoint} if self.checkpoint is not None else {}
        flat |= {"calibration": self.calibration.to_dict()} if self.calibration is not None else {}
        flat["order"] = [[list(block) for block in launch] for launch in self.order]
        return flat | {"hash": hash_of(flat)}


def hash_of(flat: Mapping[str, Any]) -> str:
    """The hash of a design's JSON form, which covers all of it but itself and the time."""
    declared = json.dumps({k: v for k, v in flat.items() if k not in ("created", "hash")}, sort_keys=True)
    return hashlib.sha256(declared.encode()).hexdigest()


def from_dict(data: dict[str, Any]) -> Design:
    """The inverse of `Design.to_dict`, also of older versions. Raises InvalidInput if the hash does not fit."""
    if hash_of(data) != data.get("hash"):
        raise InvalidInput("design.json does not have the hash it states: it was changed after it was declared")
    data = {"analysis": 1, "planted": 0.0} | data | {"pilot": rule_of(data)}
    protocol_fields = {f.name for f in fields(Protocol)} - {"name"}
    design = Design(
        name=data["name"],
        created=data["created"],
        headgrid_version=data["headgrid_version"],
        model=model_from(data["model"]),
        workload=Workload(**data["workload"]),
        arms=tuple(Arm(**arm) for arm in data["arms"]),
        control=data["control"],
        ranks=data["ranks"],
        device=data["device"],
        text=Text(**data["text"]),
        protocol=Protocol(name=data["protocol"], **{name: data[name] for name in protocol_fields}),
        order=tuple(tuple(tuple(block) for block in launch) for launch in data["order"]),
        checkpoint=data.get("checkpoint"),
        calibration=calibration_from(data["calibration"]) if data.get("calibration") else None,
    )
    return design


def analysis_of(design: Mapping[str, Any]) -> int:
    """How the run of a design's JSON form is to be analysed."""
    return design.get("analysis", 1)


def rows_to_verify(design: Design, launch: int) -> list[int]:
    """Sequences to verify: as many as the protocol says, and at least one that each owner of cache rows computes."""
    draw = random.Random(f"{design.protocol.seed}/{launch}")
    batch = design.workload.batch
    wanted = min(design.protocol.verify_sequences, batch)
    chosen = {draw.randrange(part.start, part.stop) for part in balanced(batch, wanted)}
    for layout in design.layouts:
        owners = {owned_rows(layout, batch, rank) for rank in range(layout.ranks)}
        for rows in sorted(owners):
            if len(rows) and not any(rows.start <= row < rows.stop for row in chosen):
                chosen.add(draw.randrange(rows.start, rows.stop))
    return sorted(chosen)


def random_order(arms: int, protocol: Protocol) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """order[launch][block]: a permutation of the arms for every block, warm-up blocks first, fixed by the seed."""
    draw = random.Random(protocol.seed)
    blocks = protocol.warmup_blocks + protocol.blocks
    return tuple(tuple(tuple(draw.sample(range(arms), arms)) for _ in range(blocks)) for _ in range(protocol.launches))


def _grid(model: ModelSpec, ranks: int) -> tuple[int, int] | None:
    """The n x m nearest to a square that this model allows with m > 1, as the seed's 4 x 4 is for 16."""
    pairs = [(n, ranks // n) for n in divisors(ranks) if n < ranks and model.num_kv_heads % n == 0]
    pairs = [(n, m) for n, m in pairs if m <= model.head_dim // 2]
    return min(pairs, key=lambda pair: (abs(math.log(pair[0] / pair[1])), -pair[0]), default=None)


def default_arms(model: ModelSpec, ranks: int) -> tuple[str, ...]:
    """The baseline tp(P/2)pp2, the seed as written, the same grid with all-to-all, tp P and dp P, where legal."""
    grid = _grid(model, ranks)
    names = [f"tp{ranks // 2}pp2" if ranks > 2 else "pp2"] if ranks % 2 == 0 else [f"dp{ranks}"]
    if grid:
        names += [f"n{grid[0]}m{grid[1]}:gather+concat", f"n{grid[0]}m{grid[1]}:batch"]
    names = list(dict.fromkeys([*names, f"tp{ranks}", f"dp{ranks}"]))
    return tuple(name for name in names if is_legal(model, parse_layout(name)))


def gathered_arms(model: ModelSpec, ranks: int) -> tuple[str, ...]:
    """The same grid, and one slice for each rank, with weights gathered in prefill: where links are fast they win."""
    grid = _grid(model, ranks)
    names = [f"n{n}m{m}:batch+gathered" for n, m in dict.fromkeys([grid, (1, ranks)] if grid else [])]
    return tuple(name for name in names if is_legal(model, parse_layout(name)))


def control_layout(model: ModelSpec, ranks: int) -> str | None:
    """The negative control: softmax per slice, without the sum. Another function, which verification must reject.

    None on one rank. Raises InvalidLayout where no grid has slices.
    """
    if ranks == 1:
        return None
    grid = _grid(model, ranks)
    if grid is None:
        why = f"n divides its {model.num_kv_heads} KV heads, and m is at most half of its {model.head_dim} channels"
        raise InvalidLayout(f"no n x m grid of {model.name} fits {ranks} ranks: there is no negative control", why=why)
    return f"n{grid[0]}m{grid[1]}:independent"


def name_arms(layouts: Sequence[str], planted: float = 0.0) -> tuple[Arm, ...]:
    """The first layout is the baseline and gets an A/A twin, and one that is slowed down by `planted`; labels are the
    layouts' own notation.
    """
    names = [str(parse_layout(text)) for text in layouts]
    if len(set(names)) != len(names):
        raise InvalidInput(
            f"an arm is named twice: {', '.join(names)}", why="an A/A twin of the first one is added anyway"
        )
    baseline, *others = names
    own = [Arm(baseline, baseline, "baseline"), Arm(f"{baseline} (A/A)", baseline, "aa")]
    own += [Arm(f"{baseline} (+{100 * planted:g} %)", baseline, "planted")] if planted else []
    return (*own, *(Arm(name, name, "arm") for name in others))


def declare(
    *,
    model: ModelSpec,
    workload: Workload,
    arms: Sequence[str],
    ranks: int,
    device: Device,
    text: Text,
    protocol: Protocol,
    checkpoint: str | None = None,
    calibration: Calibration | None = None,
) -> Design:
    """Fix the whole comparison. Raises InvalidLayout or InvalidInput with the legal alternatives."""
    named = name_arms(arms, protocol.planted)
    for arm in named:
        check(model, parse_layout(arm.layout), workload, ranks)
    return Design(
        name=f"compare-{model.name}",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        headgrid_version=__version__,
        model=model,
        workload=workload,
        arms=named,
        control=control_layout(model, ranks),
        ranks=ranks,
        device=device,
        text=text,
        protocol=protocol,
        order=random_order(len(named), protocol),
        checkpoint=checkpoint,
        calibration=calibration,
    )
