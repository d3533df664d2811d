"""Does each verdict follow from the numbers beside it, and are input, weights and devices the declared ones?"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from headgrid.errors import HeadgridError
from headgrid.experiment.check.finding import Finding, Note, Outcome
from headgrid.experiment.check.run import Run, segments
from headgrid.experiment.design import ENOUGH_TOKENS, SENSITIVE, allowed_multiple
from headgrid.experiment.records import Record, is_verified, of_kind
from headgrid.experiment.text import Text, read_identified, token_rows
from headgrid.layout.placement import host_numbers

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def verification(run: Run) -> Outcome:
    """Each verdict on accuracy follows from the numbers beside it."""
    multiple = allowed_multiple(run.design["workload"]["dtype"], run.design["ranks"])
    for record in of_kind(run.records, "verify"):
        where = f"launch {record['launch']}, {record['arm']}"
        phases = dict(record["phases"]) | ({"whole": record["whole"]} if "whole" in record else {})
        for name, phase in phases.items():
            for what in _phase_faults(run, phase, multiple, whole=name == "whole"):
                yield Finding("verify.numbers", f"{where}, {name}", what)
        if "whole" in record:
            errors = [phase["relative_error"] for phase in record["phases"].values()]
            if (
                None not in errors
                and not min(errors) * 0.999 <= record["whole"]["relative_error"] <= max(errors) * 1.001
            ):
                what = f"error {record['whole']['relative_error']:.3g} is outside those of its phases"
                yield Finding("verify.numbers", f"{where}, whole", what)
        greedy = record["greedy"]
        if greedy["matched"] + greedy["mismatched"] > greedy["compared"] or min(greedy.values()) < 0:
            yield Finding("verify.numbers", where, f"greedy tokens do not add up: {json.dumps(greedy)}")
        tokens = record["sequences"] * (1 + run.design["workload"]["decode_steps"])
        if greedy["compared"] != tokens:
            yield Finding("verify.numbers", where, f"compared {greedy['compared']} of {tokens} greedy tokens")
        passed = all(phase["passed"] for phase in record["phases"].values()) and greedy["mismatched"] == 0
        if record["verified"] is not (passed and record["reason"] is None):
            what = f"verified is {record['verified']}, its phases {'passed' if passed else 'did not pass'}"
            yield Finding("verify.verdict", where, f"{what}, its reason is {record['reason']!r}")


def _phase_faults(run: Run, phase: dict[str, Any], multiple: float, *, whole: bool) -> Iterator[str]:
    error, floor, bound = phase["relative_error"], phase["floor"], phase["bound"]
    if not math.isclose(bound, multiple * floor, rel_tol=1e-9):
        yield f"bound {bound:.3g} is not {multiple:g} times the floor {floor:.3g}"
    few = not whole and phase.get("tokens", ENOUGH_TOKENS) < ENOUGH_TOKENS
    if error is not None and phase["passed"] and error > bound and not few:
        yield f"passed with error {error:.3g}, the bound is {bound:.3g}"
    least = EPSILON[run.design["workload"]["dtype"]] / 50
    if error is not None and min(error, floor) < least:
        yield f"an error of {min(error, floor):.1e} is beyond {run.design['workload']['dtype']}"


def control(run: Run) -> Outcome:
    """The negative control is the declared one, was rejected by its numbers, and moves the model enough."""
    for segment in segments(run.records):
        for record in segment.of("control"):
            error, moved = record["relative_error"], record["sensitivity"]
            if record["layout"] != run.design["control"]:
                what = f"is {record['layout']}, the design declares {run.design['control']}"
                yield Finding("control", segment.where, what)
            if error != moved:  # both are the distance between its logits and the reference's
                yield Finding("control", segment.where, f"its error is {error}, its sensitivity {moved}")
            linears = record.get("linears", "model")
            alike = [v for v in segment.of("verify") if run.linears(v["arm"]) == linears]
            passes = [arm["bound"] for v in alike for arm in v["phases"].values()]
            if record["rejected"] and error is not None and passes and error < min(passes):
                yield Finding("control", segment.where, f"was rejected with error {error:.3g}, within every bound")
            if any(v["verified"] for v in segment.of("verify")) and not (
                record["rejected"] and (moved or 0) > SENSITIVE
            ):
                what = f"rejected {record['rejected']}, sensitivity {moved}: no arm can be verified after that"
                yield Finding("control", segment.where, what)


def identity(run: Run) -> Outcome:
    """All launches had the input and the weights that the design names, and devices that the environment has."""
    design, launches = run.design, list(of_kind(run.records, "launch"))
    yield from _inputs(run, launches)
    if design.get("checkpoint") is None:
        named = json.dumps([design["model"], design["seed"]], sort_keys=True)
        expected = hashlib.sha256(named.encode()).hexdigest()
        for record in launches:
            if record["weights_sha256"] != expected and run.chained:
                what = f"weights {record['weights_sha256']:.12}, the design's are {expected:.12}"
                yield Finding("identity.weights", f"launch {record['launch']}", what)
    for key in ("input_sha256", "weights_sha256", "device_names"):
        if len({str(record[key]) for record in launches}) > 1:
            yield Finding("identity.launches", key, "differs between launches")


def _inputs(run: Run, launches: Iterable[Record]) -> Iterator[Finding | Note]:
    workload = run.design["workload"]
    try:
        data = read_identified(Text(**run.design["text"]))
    except (HeadgridError, ImportError):
        yield Note("the input text is not on this machine (or is another version), so its hash was not made again")
        return
    rows = token_rows(data, workload["batch"], workload["seq"])
    expected = hashlib.sha256(b"".join(rows)).hexdigest()
    for record in launches:
        if record["input_sha256"] != expected:
            what = f"input {record['input_sha256']:.12}, the design's text gives {expected:.12}"
            yield Finding("identity.input", f"launch {record['launch']}", what)


def devices(run: Run) -> Outcome:
    """The ranks' devices are those of the environment: rank 0's host's, and those of other hosts that it has."""
    design = run.design
    if design["backend"] != {"cuda": "nccl", "cpu": "gloo"}[design["device"]]:
        yield Finding("identity.devices", "design.json", f"{design['backend']} on {design['device']}")
    environments = {0: run.env} | {each["host"]: each for each in run.env.get("hosts", [])}
    present = {host: {gpu["name"] for gpu in each.get("gpus", [])} for host, each in environments.items()}
    for record in of_kind(run.records, "launch"):
        names = record["device_names"]
        if len(names) != design["ranks"]:
            yield Finding(
                "identity.devices", f"launch {record['launch']}", f"{len(names)} devices, {design['ranks']} ranks"
            )
        hosts = record.get("hosts") or [0] * len(names)
        if list(host_numbers(hosts)) != hosts or len(hosts) != design["ranks"]:
            yield Finding("identity.devices", f"launch {record['launch']}", f"hosts of ranks: {hosts}")
        for at, there in present.items() if design["device"] == "cuda" else ():
            here = {name for name, host in zip(names, hosts, strict=False) if host == at}
            if not here <= there:
                what = f"ran on {', '.join(sorted(here))}; env.json has {', '.join(sorted(there)) or 'no GPU'}"
                yield Finding("identity.devices", f"launch {record['launch']}", what)
        if design["device"] == "cpu" and set(names) != {"cpu"}:
            yield Finding("identity.devices", f"launch {record['launch']}", f"a CPU run on {names[0]}")


def verified_times(run: Run) -> Outcome:
    """No times of an arm that is not verified: they are never taken."""
    for segment in segments(run.records):
        failed = {record["arm"] for record in segment.of("verify") if record["verified"] is not True}
        for arm in failed & {record["arm"] for record in segment.of("block")}:
            yield Finding("verify.verdict", f"{segment.where}, {arm}", "was timed although it is not verified")
    for arm in run.labels:
        if not is_verified(run.records, arm):
            yield Note(f"{arm} is not verified; its times are withheld")
