"""A study of scaling: the same layouts on several numbers of ranks, each an ordinary run, launched in turns.

Strong scaling keeps the batch, weak scaling the batch of each rank; both begin at the fewest ranks. Every point of the
study is a run folder of its own inside the study's. A round launches every point once, in random order, so that drift
of the machine does not look like scaling; the rounds are the replicates (`scale_stats`).
"""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from headgrid.errors import HeadgridError, InvalidInput, NotAvailable
from headgrid.experiment import budget, folder, plan
from headgrid.experiment.design import Design
from headgrid.experiment.families import Family, parse_family
from headgrid.experiment.machine import Machine, ensure_devices, look
from headgrid.experiment.progress import Progress
from headgrid.experiment.runner import carry_out_launch, expected_records
from headgrid.experiment.starting import HERE, Starter
from headgrid.experiment.telemetry import DEFAULT_HZ
from headgrid.layout.layout import Layout
from headgrid.layout.legal import is_legal
from headgrid.models.pretrained import find_spec
from headgrid.spec.model import ModelSpec

Mode = Literal["strong", "weak"]
MODES: tuple[Mode, ...] = ("strong", "weak")
DEFAULT_CPU_COUNTS = (1, 2, 4)
DEFAULT_FAMILIES = ("tp", "dp", "n1m:batch", "n1m:batch+gathered")
STUDY_FILE = "scale.json"


@dataclass(frozen=True, slots=True)
class Point:
    """So many ranks in these modes: one run. `layouts` are the families' members there, None where one has none."""

    ranks: int
    modes: tuple[Mode, ...]
    run: str
    layouts: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All that decides what is run, beside the points' own designs. `order[round]` are points by index."""

    name: str
    created: str
    families: tuple[str, ...]
    points: tuple[Point, ...]
    designs: tuple[str, ...]
    """Hashes of the points' designs."""
    order: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its hash."""
        flat = {"schema": 1, **dataclasses.asdict(self)}
        declared = json.dumps({key: value for key, value in flat.items() if key != "created"}, sort_keys=True)
        return flat | {"hash": hashlib.sha256(declared.encode()).hexdigest()}


def from_dict(data: dict[str, Any]) -> Study:
    """The inverse of `Study.to_dict`. Raises InvalidInput if the hash does not fit."""
    points = tuple(
        Point(p["ranks"], tuple(p["modes"]), Path(p["run"]).name, tuple(p["layouts"])) for p in data["points"]
    )
    study = Study(
        name=data["name"],
        created=data["created"],
        families=tuple(data["families"]),
        points=points,
        designs=tuple(data["designs"]),
        order=tuple(map(tuple, data["order"])),
    )
    if study.to_dict()["hash"] != data.get("hash"):
        raise InvalidInput(f"{STUDY_FILE} does not have the hash it states: it was changed after it was declared")
    return study


# --- planning ---------------------------------------------------------------------------------------------------------


def make(
    wishes: plan.Wishes, counts: Sequence[int] | None, families: Sequence[str], modes: Sequence[Mode]
) -> tuple[Study, list[Design], list[str]]:
    """The study, its points' designs, and what the user should know. Raises before any process starts.

    `wishes.batch` is that of the fewest ranks. `counts`: 1, 2, 4, 8 as far as there are GPUs; 1, 2, 4 on a CPU.
    """
    plan.check_names(wishes)
    machine = look(DEFAULT_CPU_COUNTS[-1], wishes.device)  # type: ignore[arg-type]
    ranks = _counts(counts, machine, wishes.started_ranks)
    model, _ = find_spec(wishes.model or plan.default_model(machine))
    chosen = list(map(parse_family, families))
    places, notes = _places(ranks, modes, chosen, model)
    if wishes.batch is None:
        first, _ = _design(wishes, places[0])
        fits = _common_batch(first, places)
        notes += [f"batch {fits} on {ranks[0]} ranks, which strong scaling keeps and weak scaling multiplies"]
        wishes = dataclasses.replace(wishes, batch=fits)
    notes += _uneven(wishes.batch, [place.point.ranks for place in places if "strong" in place.point.modes])
    designs: list[Design] = []
    for place in places:
        design, said = _design(wishes, place)
        notes += [f"{place.point.run}: {note}" for note in said]
        designs.append(dataclasses.replace(design, name=f"scale-{model.name}-{place.point.run}"))
    points = [place.point for place in places]
    return _declare(f"scale-{model.name}", tuple(map(str, chosen)), points, designs), designs, notes


@dataclass(frozen=True, slots=True)
class _Place:
    """A point, its distinct layouts, and by how much its batch is larger than that of the fewest ranks."""

    point: Point
    layouts: tuple[Layout, ...]
    growth: int


def _counts(counts: Sequence[int] | None, machine: Machine, started: int | None) -> tuple[int, ...]:
    """The numbers of ranks, ascending: each a multiple of the fewest, so that the batch of a rank can stay the same.

    `started`: processes of a launcher, of which each number takes the first.
    """
    most = started or (machine.num_devices if machine.device == "cuda" else DEFAULT_CPU_COUNTS[-1])
    if counts is None:
        counts = [count for count in (1, 2, 4, 8) if count <= most]
        if len(counts) < 2:
            what = "started ranks" if started else "GPUs"
            raise NotAvailable(f"{most} {what} are nothing to scale over", legal=("--device cpu",) * (not started))
    ranks = tuple(sorted(set(counts)))
    if len(ranks) < 2 or ranks[0] < 1 or any(count % ranks[0] for count in ranks):
        raise InvalidInput(
            f"{','.join(map(str, ranks)) or 'no number of'} ranks are nothing to scale over",
            why="scaling needs two numbers of ranks or more, each a multiple of the smallest",
            legal=("--ranks 1,2,4", "--ranks 2,4,8"),
        )
    if started is not None and ranks[-1] > started:
        raise NotAvailable(f"{ranks[-1]} ranks, but the launcher started {started}", legal=(f"--ranks 1,{started}",))
    ensure_devices(machine, ranks[-1], started=started is not None)
    return ranks


def _places(
    ranks: Sequence[int], modes: Sequence[Mode], families: Sequence[Family], model: ModelSpec
) -> tuple[list[_Place], list[str]]:
    """All points, the fewest ranks first: there both modes are the same run. And what is left out."""
    if not families or len({family.text for family in families}) < len(families):
        raise InvalidInput("no family of layouts is named, or one is named twice", legal=DEFAULT_FAMILIES)
    members = {count: [_member(family, count, model) for family in families] for count in ranks}
    notes: list[str] = []
    for number, family in enumerate(families):
        has = [count for count in ranks if members[count][number]]
        if len(has) < 2:
            raise InvalidInput(
                f"{family} has a layout of {model.name} on {len(has)} of these numbers of ranks: "
                + ", ".join(map(str, ranks)),
                why="scaling is between at least two",
                legal=("other --ranks", *DEFAULT_FAMILIES),
            )
        notes += [f"{family} has no layout of {count} ranks" for count in ranks if count not in has]
        notes += [_plainer(family, count) for count in has if family.left_out(count)]
    first, *others = ranks
    places = [_place(first, tuple(modes), 1, members[first])]
    for count in others:
        for mode in modes:
            places.append(_place(count, (mode,), count // first if mode == "weak" else 1, members[count]))
    return places, notes


def _plainer(family: Family, ranks: int) -> str:
    """That a family's member is a plainer layout than its notation says."""
    useless = " and ".join(family.left_out(ranks))
    return f"{family} on {ranks} rank{'s' * (ranks > 1)} is run as {family.at(ranks)}: {useless} would mean nothing"


def _place(ranks: int, modes: tuple[Mode, ...], growth: int, members: Sequence[Layout | None]) -> _Place:
    layouts = tuple(dict.fromkeys(layout for layout in members if layout))
    if not layouts:
        raise InvalidInput(f"no family has a layout of {ranks} ranks", legal=("other --ranks", *DEFAULT_FAMILIES))
    named = tuple(str(layout) if layout else None for layout in members)
    return _Place(Point(ranks, modes, "-".join([f"ranks{ranks}", *modes]), named), layouts, growth)


def _member(family: Family, ranks: int, model: ModelSpec) -> Layout | None:
    """The family's layout of so many ranks, if that model can run it."""
    layout = family.at(ranks)
    return layout if layout is not None and is_legal(model, layout) else None


def _common_batch(first: Design, places: Sequence[_Place]) -> int:
    """The largest batch of the fewest ranks, up to that of `first`, with which every point fits into memory; a multiple
    of the largest number of ranks where it can be, so that all ranks have equally many rows.
    """
    batch = first.workload.batch
    for place in places:
        free_bytes = look(place.point.ranks, first.device).free_bytes
        limit = max(batch * place.growth, *(layout.dp for layout in place.layouts))
        fits = budget.largest_batch(first.model, place.layouts, first.workload, first.device, free_bytes, limit)
        batch = min(batch, fits // place.growth)
    largest = max(place.point.ranks for place in places)
    return max(batch // largest * largest or batch, 1)


def _uneven(batch: int | None, counts: Sequence[int]) -> list[str]:
    """What strong scaling cannot reach with this batch, whatever the machine: some rank has more rows than others."""
    return [
        f"{batch} sequences do not divide among {count} ranks: by rows, no layout can exceed {batch / full:.3f}"
        for count in counts
        if batch and (full := count * -(-batch // count)) != batch
    ]


def _design(wishes: plan.Wishes, place: _Place) -> tuple[Design, list[str]]:
    """The design of one point; a refusal also says of which, and names the batch as the command takes it."""
    ranks, batch = place.point.ranks, wishes.batch and wishes.batch * place.growth
    arms = tuple(map(str, place.layouts))
    try:
        # a study compares launches, and what each finds planted inside itself would say nothing about that; one turn a
        # block at every size, since a pilot would give each number of ranks blocks of its own
        own = {"ranks": ranks, "started_ranks": wishes.started_ranks and ranks, "least_ranks": 1, "batch": batch}
        own |= {"arms": arms, "planted": 0.0, "block_s": 0.0}
        return plan.make(dataclasses.replace(wishes, **own))
    except HeadgridError as error:
        error.what += f" ({place.point.run}, batch {batch or 'as fits'})"
        error.legal = tuple(_at_fewest_ranks(text, place.growth) for text in error.legal)
        raise


def _at_fewest_ranks(legal: str, growth: int) -> str:
    """`--batch N` of a point as the command takes it: the batch of the fewest ranks."""
    option, _, number = legal.partition(" ")
    return f"--batch {max(1, int(number) // growth)}" if option == "--batch" and number.isdigit() else legal


def _declare(name: str, families: tuple[str, ...], points: Sequence[Point], designs: Sequence[Design]) -> Study:
    protocol = designs[0].protocol
    draw = random.Random(f"scale/{protocol.seed}")
    return Study(
        name=name,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        families=families,
        points=tuple(points),
        designs=tuple(design.to_dict()["hash"] for design in designs),
        order=tuple(tuple(draw.sample(range(len(points)), len(points))) for _ in range(protocol.launches)),
    )


# --- the folder and the work ------------------------------------------------------------------------------------------


def create(study: Study, designs: Sequence[Design], environment: dict[str, Any], out: Path) -> Path:
    """Make the study's folder with a run folder for every point. It appears whole or not at all."""
    target = out / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{study.name}"
    building = out / f".{target.name}.{os.getpid()}"
    try:
        building.mkdir(parents=True)
        for point, design in zip(study.points, designs, strict=True):
            folder.create_at(building / point.run, design, environment)
        folder.write_json(building / STUDY_FILE, study.to_dict())
        building.rename(target)
    except OSError as error:
        raise InvalidInput(f"cannot write the folder {target}", why=str(error), legal=("--out FOLDER",)) from error
    return target


def open_study(path: Path) -> tuple[Study, list[tuple[Design, list[dict[str, Any]]]]]:
    """The study in a folder, and design and records of each of its points. Raises InvalidInput if it is none."""
    try:
        study = from_dict(json.loads((path / STUDY_FILE).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is not the folder of a study", why=f"{STUDY_FILE}: {error}") from error
    runs = [folder.open_run(path / point.run) for point in study.points]
    if tuple(design.to_dict()["hash"] for design, _ in runs) != study.designs:
        raise InvalidInput(f"a run in {path} has another design than the study declared")
    return study, runs


def carry_out(
    path: Path,
    on_progress: Callable[[Progress], None],
    telemetry_hz: float = DEFAULT_HZ,
    starter: Starter = HERE,
) -> None:
    """Launch every point once in each round, in the declared order; what the journals already have is not repeated.

    Each point's folder gets its telemetry, `telemetry_hz` samples a second (0: none).
    """
    study, runs = open_study(path)
    totals = [expected_records(design) for design, _ in runs]
    done = [min(len(records), total) for (_, records), total in zip(runs, totals, strict=True)]
    for round_number, order in enumerate(study.order):
        for index in order:

            def show(progress: Progress, index: int = index) -> None:
                done[index] = progress.done
                latest = f"{study.points[index].run}: {progress.latest}"
                on_progress(Progress(sum(done), sum(totals), latest))

            carry_out_launch(path / study.points[index].run, round_number, show, telemetry_hz, starter)
