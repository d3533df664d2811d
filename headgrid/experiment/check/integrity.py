"""Are the documents what was written? Hashes, the chain, and every figure of the summary made again."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run
from headgrid.experiment.records import of_kind
from headgrid.experiment.summary import summary_of

SAME = 1e-9
"""Relative difference of figures that are equal but for the last digits of another version of a library."""
_SHOWN = 12


def design_hash(run: Run) -> Outcome:
    """The hash that the design states, and that every launch carried out."""
    declared = {key: value for key, value in run.design.items() if key not in ("created", "hash")}
    found = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()
    if found != run.design["hash"]:
        yield Finding("design.hash", "design.json", f"its content has {found[:12]}, it states {run.design['hash']:.12}")
    for record in of_kind(run.records, "launch"):
        if record["design_hash"] != run.design["hash"]:
            other = f"ran design {record['design_hash']:.12}, design.json is {run.design['hash']:.12}"
            yield Finding("design.hash", f"launch {record['launch']}", other)


def chain(run: Run) -> Outcome:
    """Each journal line follows from the one before it, and the summary names the last one."""
    sealed = run.seal
    for line in sealed.broken[:_SHOWN]:
        what = "is not what was written behind the line before it (edited, or lines were removed, inserted or moved)"
        yield Finding("journal.chain", f"journal.jsonl, line {line}", what)
    if not run.chained:
        yield Note("not chained (older schema): edits that keep everything else consistent would not show")
    elif sealed.unchained and not sealed.broken:
        yield Note(f"the first {sealed.unchained} records are not chained (an older version wrote them)")
    if run.summary is None:
        return
    stated = run.summary.get("journal")
    if stated is None:
        if run.chained:
            yield Finding("journal.seal", "summary.json", "the journal is chained, but its last link is not in here")
    elif stated != {"records": sealed.records, "link": sealed.link}:
        what = f"made from {stated['records']} records ending in {stated['link']:.12}, the journal has"
        yield Finding("journal.seal", "summary.json", f"{what} {sealed.records} ending in {sealed.link:.12}")


def environment_hash(run: Run) -> Outcome:
    """The environment that every launch had."""
    if not run.chained:
        return
    for record in of_kind(run.records, "launch"):
        if record["environment_sha256"] != run.env_sha256:
            what = f"ran with env.json {record['environment_sha256']:.12}, it is {run.env_sha256:.12}"
            yield Finding("environment.hash", f"launch {record['launch']}", what)


def summary_figures(run: Run) -> Outcome:
    """summary.json, figure by figure. What an older version did not compute is named, and what it did must agree."""
    if run.summary is None:
        yield Note("there is no summary.json yet: `headgrid report` makes it")
        return
    made = json.loads(json.dumps(summary_of(run.design, run.records, run.telemetry, run.env)))
    kept = {key: value for key, value in run.summary.items() if key not in ("run", "journal")}
    older = not run.chained and not run.same_version
    made.pop("run", None)
    found = list(differences(kept, made))
    gone = [path for path, _, now in found if older and now == "nothing"]
    new = [path for path, stored, _ in found if not run.same_version and stored == "nothing"]
    if gone or new:
        yield Note(f"summary.json is of an older version: {len(gone)} figures are no longer made, {len(new)} are new")
    changed = [each for each in found if each[0] not in {*gone, *new}]
    for path, stored, now in changed[:_SHOWN]:
        yield Finding("summary.figures", f"summary.json: {path}", f"states {stored}, the journal gives {now}")
    if len(changed) > _SHOWN:
        yield Finding("summary.figures", "summary.json", f"{len(changed) - _SHOWN} more figures differ")


def differences(stored: Any, made: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ: path, what the one says, what the other says."""
    if isinstance(stored, dict) and isinstance(made, dict):
        for key in [*stored, *(key for key in made if key not in stored)]:
            below = f"{path}.{key}" if path else key
            if key not in stored or key not in made:
                yield below, _shown(stored, key), _shown(made, key)
            else:
                yield from differences(stored[key], made[key], below)
    elif isinstance(stored, list) and isinstance(made, list) and len(stored) == len(made):
        for index, (one, other) in enumerate(zip(stored, made, strict=True)):
            yield from differences(one, other, f"{path}[{_name(one, index)}]")
    elif not _same(stored, made):
        yield path, f"{json.dumps(stored):.80}", f"{json.dumps(made):.80}"


def _shown(values: dict[str, Any], key: str) -> str:
    return f"{json.dumps(values[key]):.80}" if key in values else "nothing"


def _name(value: Any, index: int) -> str:
    """A row of the summary by what it is about."""
    if not isinstance(value, dict):
        return str(index)
    parts = [str(value[key]) for key in ("label", "a", "b", "phase", "collective") if key in value]
    return ", ".join(parts) or str(index)


def _same(one: Any, other: Any) -> bool:
    numbers = (int, float)
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, numbers):
        return type(one) is type(other) and one == other
    return isinstance(other, numbers) and math.isclose(one, other, rel_tol=SAME, abs_tol=0.0)
