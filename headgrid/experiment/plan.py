"""From what a user asked for to a design: defaults sized for this machine, refusals before anything starts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgrid.errors import InvalidInput, NotAvailable
from headgrid.experiment import budget, calibrate, fp8
from headgrid.experiment.design import (
    SEED_PROTOCOL,
    Design,
    Protocol,
    control_layout,
    declare,
    default_arms,
    gathered_arms,
)
from headgrid.experiment.machine import Machine, ensure_devices, environment, look
from headgrid.experiment.pilot import PilotRule
from headgrid.experiment.text import identify
from headgrid.layout.layout import Layout, parse_layout
from headgrid.layout.legal import check
from headgrid.models.pretrained import find_spec
from headgrid.spec.calibration import Calibration, read_calibration
from headgrid.spec.model import ModelSpec
from headgrid.spec.workload import Workload, dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The options of `headgrid compare`; None means the default for this machine."""

    model: str | None = None
    arms: tuple[str, ...] | None = None
    ranks: int | None = None
    batch: int | None = None
    seq: int | None = None
    decode_steps: int | None = None
    chunk_positions: int = 0
    dtype: str | None = None
    blocks: int | None = None
    launches: int | None = None
    protocol: str = "default"
    text: str = "pydoc_data.topics"
    device: str | None = None
    seed: int = 0
    started_ranks: int | None = None
    """Ranks that a launcher has already started, on this host and perhaps on others."""
    calibration: Path | None = None
    """A file of `headgrid calibrate`."""
    least_ranks: int = 2
    """One rank is nothing to compare layouts on, but where a study of scaling begins."""
    planted: float = 0.02
    """Share by which a copy of the baseline is slowed down, to see whether the run finds it; 0: no such copy."""
    block_s: float | None = None
    """Seconds that an arm's part of a block lasts at least, by a pilot; 0: no pilot, one turn."""


_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "seed-small",
        "batch": 16,
        "seq": 64,
        "decode_steps": 3,
        "dtype": "float32",
        "blocks": 5,
        "verify": 16,
        "block_s": 0.25,
    },
    "cuda": {
        "model": "seed",
        "batch": 128,
        "seq": 10_000,
        "decode_steps": 32,
        "dtype": "float16",
        "blocks": 8,
        "verify": 4,
        "block_s": 0.5,
    },
}
MOST_BLOCK = 4.0
"""How many times the least length of a block its dependence may make it: on a busy host a run would have no end."""


def default_model(machine: Machine) -> str:
    """The model that is run where none is named."""
    return _DEFAULTS[machine.device]["model"]


def check_names(wishes: Wishes) -> None:
    """Raise InvalidInput for a device or dtype that is not known."""
    if wishes.device not in (None, "cpu", "cuda"):
        raise InvalidInput(f"device {wishes.device!r} is not known", legal=("cpu", "cuda"))
    if wishes.dtype in ("float64", "fp64"):
        raise InvalidInput("float64 is the reference's own dtype", legal=("float32", "float16", "bfloat16"))


def make(wishes: Wishes) -> tuple[Design, list[str]]:
    """The design, and what had to be decided that the user should know. Raises before any process starts."""
    check_names(wishes)
    machine = look(wishes.started_ranks or wishes.ranks, wishes.device)  # type: ignore[arg-type]
    ranks = _ranks(wishes, machine)
    default = _DEFAULTS[machine.device]
    model, folder = find_spec(wishes.model or default_model(machine))
    if not model.is_causal:
        raise InvalidInput(
            f"{model.name} is bidirectional, and a comparison times decoding too", legal=("a causal --model",)
        )
    arms = wishes.arms if wishes.arms is not None else default_arms(model, ranks)
    if wishes.arms is None and machine.device == "cuda":
        arms += gathered_arms(model, ranks)
    notes: list[str] = []
    if wishes.arms is None and wishes.batch is not None:
        few = [arm for arm in arms if parse_layout(arm).dp > wishes.batch]
        arms = tuple(arm for arm in arms if arm not in few)
        notes += [f"without {arm}: {wishes.batch} sequences are too few for its replicas" for arm in few]
    if not arms:
        raise InvalidInput("no arms to compare", legal=("--arms tp8pp2,n4m4:batch",))
    workload = _workload(wishes, default, model)
    layouts = list(dict.fromkeys(map(parse_layout, arms)))
    control = control_layout(model, ranks)
    for layout in (*layouts, *([parse_layout(control)] if control else [])):
        check(model, layout, workload, ranks)
    fp8.ensure(model, layouts, machine.device)
    if wishes.batch is None:
        fits = budget.largest_batch(model, layouts, workload, machine.device, machine.free_bytes, workload.batch)
        if 0 < fits < workload.batch:
            notes.append(f"batch {fits} instead of {workload.batch}: the largest that the predicted memory allows")
            workload = dataclasses.replace(workload, batch=fits)
    budget.ensure_fits(model, layouts, workload, machine.device, machine.free_bytes)
    calibration, said = _calibration(wishes, machine, ranks, workload, layouts)
    notes += said
    design = declare(
        model=model,
        workload=workload,
        arms=arms,
        ranks=ranks,
        device=machine.device,
        text=identify(wishes.text),
        protocol=_protocol(wishes, default, workload),
        checkpoint=str(folder.absolute()) if folder is not None else None,
        calibration=calibration,
    )
    return design, notes


def _calibration(
    wishes: Wishes, machine: Machine, ranks: int, workload: Workload, layouts: list[Layout]
) -> tuple[Calibration | None, list[str]]:
    """What was measured of this machine, and in what the machine has changed since."""
    if wishes.calibration is None:
        return None, []
    found = read_calibration(wishes.calibration)
    dtypes = [workload.dtype] + ["float8"] * any(layout.linears == "fp8" for layout in layouts)
    if machine.device == "cpu":  # which emulates FP8 in the wider dtype
        dtypes = dtypes[:1]
    return found, calibrate.ensure_fits(found, machine.device, ranks, dtypes, environment())


def recheck(design: Design, *, started: bool = False) -> None:
    """Raise what `make` would raise if a design does not fit this machine, before any process starts.

    `started`: a launcher has started the ranks, perhaps not all of them here.
    """
    machine = look(design.ranks, design.device)
    _ranks(Wishes(ranks=design.ranks, started_ranks=design.ranks if started else None, least_ranks=1), machine)
    fp8.ensure(design.model, design.layouts, design.device)
    # what is free changes from one look to the next: a batch that was chosen a moment ago is not refused for that
    free_bytes = machine.free_bytes + (machine.free_bytes // 16 if machine.device == "cpu" else 0)
    budget.ensure_fits(design.model, design.layouts, design.workload, design.device, free_bytes)


def _ranks(wishes: Wishes, machine: Machine) -> int:
    if wishes.started_ranks is not None:
        if wishes.ranks not in (None, wishes.started_ranks):
            raise InvalidInput(
                f"--ranks {wishes.ranks}, but the launcher started {wishes.started_ranks}",
                legal=(f"--ranks {wishes.started_ranks}", "no --ranks"),
            )
    ranks = wishes.ranks or wishes.started_ranks or machine.num_devices
    ensure_devices(machine, ranks, started=wishes.started_ranks is not None)
    if ranks < wishes.least_ranks:
        raise NotAvailable("a comparison of layouts needs at least 2 devices", legal=("--device cpu",))
    return ranks


def _workload(wishes: Wishes, default: dict[str, Any], model: ModelSpec) -> Workload:
    sizes = {name: getattr(wishes, name) or default[name] for name in ("batch", "seq", "decode_steps")}
    sizes["dtype"] = dtype_name(wishes.dtype or default["dtype"])
    if wishes.seq is None:
        sizes["seq"] = min(sizes["seq"], model.max_positions - sizes["decode_steps"])
    return Workload(**sizes, chunk_positions=wishes.chunk_positions)


def _protocol(wishes: Wishes, default: dict[str, Any], workload: Workload) -> Protocol:
    if wishes.protocol not in ("default", "seed"):
        raise InvalidInput(f"protocol {wishes.protocol!r} is not known", legal=("default", "seed"))
    base = SEED_PROTOCOL if wishes.protocol == "seed" else Protocol(blocks=default["blocks"])
    changes: dict[str, Any] = {name: getattr(wishes, name) for name in ("blocks", "launches") if getattr(wishes, name)}
    verify = min(default["verify"], workload.batch)
    changes["planted"] = wishes.planted
    changes["pilot"] = _pilot(default["block_s"] if wishes.block_s is None and base.name != "seed" else wishes.block_s)
    return dataclasses.replace(base, seed=wishes.seed, verify_sequences=verify, **changes)


def _pilot(block_s: float | None) -> PilotRule | None:
    """The seed's protocol counts iterations: a block of it is one turn unless its length is asked for."""
    return PilotRule(block_s=block_s, most_block_s=MOST_BLOCK * block_s) if block_s else None
