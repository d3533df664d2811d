"""Ways to tamper with a run, and the gate that has to find each.

`crude` ones edit files. Of `forged` ones everything that follows is made again: the design's hash where it stands, the
environment's, the chain, its seal and the summary; only what the record says twice is left to contradict them.
"""

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import honest_run

from headgrid.experiment.folder import write_json

Record = dict[str, Any]


@dataclass
class Documents:
    """What a forger edits."""

    design: Record
    env: Record
    records: list[Record]

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """Records of a kind with these fields."""
        every = [record for record in self.records if record["kind"] == kind]
        return [record for record in every if all(record[key] == value for key, value in fields.items())]

    def retime(self, change: Callable[[Record], None], *arms: str, clocks: bool = True) -> None:
        """Change the times of some arms' blocks; `clocks`: and move all that was written after each.

        Turns follow their block's times, unless they were changed themselves.
        """
        shift = 0.0
        for record in self.records:
            record.update({"started_s": record["started_s"] + shift} if "started_s" in record else {})
            if record["kind"] == "block":
                before = copy.deepcopy(record)
                if record["arm"] in arms:
                    change(record)
                    follow(record, before)
                turns = record["turns"]
                for n in range(len(turns["prefill_s"])):
                    for phase in ("prefill", "decode"):
                        turns[f"{phase}_start_s"][n] += shift
                        shift += (turns[f"{phase}_s"][n] - before["turns"][f"{phase}_s"][n]) * clocks
                record.update({f"{phase}_start_s": turns[f"{phase}_start_s"][0] for phase in ("prefill", "decode")})
            record["time_s"] += shift


def follow(record: Record, before: Record) -> None:
    for phase in ("prefill_s", "decode_s"):
        if record["turns"][phase] == before["turns"][phase]:
            factor = max(record[phase]) / max(before[phase])
            record["turns"][phase] = [round(seconds * factor, 9) for seconds in before["turns"][phase]]


def read_documents(folder: Path) -> Documents:
    design, env = (json.loads((folder / name).read_text()) for name in ("design.json", "env.json"))
    lines = (folder / "journal.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "chain"} for line in lines]
    return Documents(design, env, records)


def forge(folder: Path, change: Callable[[Documents], None]) -> None:
    """Change the documents and make again every hash, the chain, the seal and the summary."""
    found = read_documents(folder)
    change(found)
    declared = {key: value for key, value in found.design.items() if key not in ("created", "hash")}
    found.design["hash"] = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()
    write_json(folder / "design.json", found.design)
    write_json(folder / "env.json", found.env)
    for record in found.of("launch"):
        record["design_hash"] = found.design["hash"]
        record["environment_sha256"] = hashlib.sha256((folder / "env.json").read_bytes()).hexdigest()
    honest_run.write_journal(folder, found.records)
    honest_run.conclude(folder, found.design, found.records)


# --- crude -----------------------------------------------------------------------------------------------------------


def journal(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "journal.jsonl"
        path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))

    return apply


def document(name: str, edit: Callable[[Record], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        edit(found)
        write_json(folder / name, found)

    return apply


def rehashed(design: Record) -> None:
    design["margin"] = 0.2
    declared = {key: value for key, value in design.items() if key not in ("created", "hash")}
    design["hash"] = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()


def strip(lines: list[str]) -> list[str]:
    return [re.sub(r', "chain": "[0-9a-f]{64}"', "", line) for line in lines]


def digit(lines: list[str]) -> list[str]:
    place = next(n for n, line in enumerate(lines) if '"kind": "block"' in line)
    return [*lines[:place], lines[place].replace('"prefill_s": [', '"prefill_s": [1'), *lines[place + 1 :]]


def ratio(summary: Record) -> None:
    summary["comparisons"][2]["ratio"] *= 1.01


def narrow(summary: Record) -> None:
    interval = summary["arms"][2]["prefill_tokens_per_s"]["ci95"]
    interval[0] += 0.25 * (interval[1] - interval[0])


SUMMARY = "summary.json"
CRUDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a time edited": (journal(digit), "journal.chain"),
    "a record removed": (journal(lambda x: [*x[:30], *x[31:]]), "journal.chain"),
    "the first record removed": (journal(lambda x: x[1:]), "journal.chain"),
    "two records swapped": (journal(lambda x: [*x[:40], x[41], x[40], *x[42:]]), "journal.chain"),
    "a record inserted again": (journal(lambda x: [*x[:40], x[39], *x[40:]]), "journal.chain"),
    "the end cut off": (journal(lambda x: x[:-9]), "journal.seal"),
    "a time edited, the links taken off": (journal(lambda x: strip(digit(x))), "journal.seal"),
    "one link changed": (journal(lambda x: [*x[:9], x[9][:-5] + "0000" + x[9][-1], *x[10:]]), "journal.damaged"),
    "a record added without a link": (journal(lambda x: [*x, '{"kind": "end", "launch": 1}\n']), "journal.chain"),
    "a line of rubbish": (journal(lambda x: [*x[:9], "rubbish\n", *x[9:]]), "journal.damaged"),
    "a field named twice": (journal(lambda x: [*x[:9], '{"kind": "end", ' + x[9][1:], *x[10:]]), "journal.damaged"),
    "a ratio improved": (document(SUMMARY, ratio), "summary.figures"),
    "an interval narrowed": (document(SUMMARY, narrow), "summary.figures"),
    "a verdict changed": (document(SUMMARY, lambda s: s["comparisons"][1].update(verdict="faster")), "summary.figures"),
    "a warning left out": (document(SUMMARY, lambda s: s["warnings"].pop()), "summary.figures"),
    "a losing arm left out": (document(SUMMARY, lambda s: s["arms"].pop()), "summary.figures"),
    "a figure added": (document(SUMMARY, lambda s: s["arms"][2].update(mfu=0.77)), "summary.figures"),
    "memory halved": (document(SUMMARY, lambda s: s["arms"][2]["memory_bytes"].update(total=9)), "summary.figures"),
    "the seal replaced": (document(SUMMARY, lambda s: s["journal"].update(link="0" * 64)), "journal.seal"),
    "the seal removed": (document(SUMMARY, lambda s: s.pop("journal")), "journal.seal"),
    "the margin widened": (document("design.json", lambda d: d.update(margin=0.2)), "design.hash"),
    "the margin widened, hash and all": (document("design.json", rehashed), "design.hash"),
    "other GPUs named": (document("env.json", lambda e: e["gpus"][0].update(driver="9")), "environment.hash"),
}


# --- forged ----------------------------------------------------------------------------------------------------------


def scaled(factor: float, *phases: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for phase in phases or ("prefill_s", "decode_s"):
            for times in (record, record["turns"]):
                times[phase] = [round(seconds * factor, 9) for seconds in times[phase]]

    return change


def faster(factor: float, *arms: str, clocks: bool, phases: tuple[str, ...] = ()) -> Callable[[Documents], None]:
    return lambda found: found.retime(scaled(factor, *phases), *arms, clocks=clocks)


def rounded(record: Record) -> None:
    record["prefill_s"] = [round(seconds, 3) for seconds in record["prefill_s"]]


def unrounded(record: Record) -> None:
    record["prefill_s"] = [seconds * 0.97123456789 for seconds in record["prefill_s"]]


def constant(found: Documents) -> None:
    draw = random.Random(1)

    def change(record: Record) -> None:
        record["decode_s"] = [0.667123457, *(0.667123457 - draw.randrange(1, 20_000) * 1e-9 for _ in range(3))]
        record["decode_s"] = [round(seconds, 9) for seconds in record["decode_s"]]
        record["turns"]["decode_s"] = [0.667123457] * len(record["turns"]["decode_s"])

    found.retime(change, "tp4")


def copied(found: Documents) -> None:
    blocks = found.of("block", arm="dp4", launch=0)
    best = copy.deepcopy(blocks[2]["prefill_s"])
    found.retime(lambda record: record.update(prefill_s=list(best)), "dp4")


def derived(found: Documents) -> None:
    def change(record: Record) -> None:
        twin = found.of("block", arm="tp4", launch=record["launch"], block=record["block"])[0]
        record["prefill_s"] = [round(seconds * 0.8123, 9) for seconds in twin["prefill_s"]]

    found.retime(change, "n2m2:batch")


def without(test: Callable[[Record], bool]) -> Callable[[Documents], None]:
    def change(found: Documents) -> None:
        found.records = [record for record in found.records if not test(record)]

    return change


def again(found: Documents) -> None:
    place = found.records.index(found.of("block", arm="dp4", block=3)[0])
    found.records.insert(place + 1, scaled(0.93)(copied := copy.deepcopy(found.records[place])) or copied)


def swapped_blocks(found: Documents) -> None:
    a, b = (n for n, r in enumerate(found.records) if r["kind"] == "block" and r["launch"] == 0 and r["block"] == 2
            and r["position"] in (0, 1))  # fmt: skip
    found.records[a], found.records[b] = found.records[b], found.records[a]
    found.records[a]["time_s"], found.records[b]["time_s"] = found.records[b]["time_s"], found.records[a]["time_s"]


def swapped_design(found: Documents) -> None:
    swapped_blocks(found)
    order = found.design["order"][0][2]
    order[0], order[1] = order[1], order[0]
    for record in found.of("block", launch=0, block=2):
        record["position"] = order.index([arm["label"] for arm in found.design["arms"]].index(record["arm"]))


def first_launch_dropped(found: Documents) -> None:
    found.records = [record | {"launch": 0} for record in found.records if record["launch"] == 1]
    found.design |= {"launches": 1, "order": found.design["order"][1:]}


def each(kind: str, change: Callable[[Record], Any], **fields: Any) -> Callable[[Documents], None]:
    def apply(found: Documents) -> None:
        for record in found.of(kind, **fields):
            change(record)

    return apply


def designed(**fields: Any) -> Callable[[Documents], None]:
    return lambda found: found.design.update(fields)


def worked(**fields: Any) -> Callable[[Documents], None]:
    return lambda found: found.design["workload"].update(fields)


def error_beyond(record: Record) -> None:
    for phase in (*record["phases"].values(), record["whole"]):
        phase["relative_error"] = 0.31


def bound_raised(record: Record) -> None:
    error_beyond(record)
    for phase in (*record["phases"].values(), record["whole"]):
        phase["bound"] = 0.4


def floor_raised(record: Record) -> None:
    record["phases"]["decode"]["floor"] *= 3


def too_exact(record: Record) -> None:
    for phase in (*record["phases"].values(), record["whole"]):
        phase["relative_error"] = 3e-9


def unverify(record: Record) -> None:
    record.update(verified=False, reason="decode error above its bound")


def held(key: str, factor: float, *, predicted: bool) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for rows in (record["per_rank"], record["predicted"])[: 1 + predicted]:
            for row in rows:
                row[key] = int(row[key] * factor)

    return change


def h100(found: Documents) -> None:
    for gpu in found.env["gpus"]:
        gpu |= {"name": "NVIDIA H100 80GB HBM3", "memory_total_bytes": 85_520_809_984}
    for record in found.of("launch"):
        record["device_names"] = ["NVIDIA H100 80GB HBM3"] * 4


def renamed(found: Documents) -> None:
    for record in found.of("block"):
        record["arm"] = {"tp4": "dp4", "dp4": "tp4"}.get(record["arm"], record["arm"])


def unfinished(found: Documents) -> None:
    last = max(n for n, record in enumerate(found.records) if record["kind"] == "block")
    del found.records[last]


def ops(change: Callable[[Record], Any]) -> Callable[[Record], None]:
    return lambda record: [change(op) for op in record["ops"]] and None


def ahead(found: Documents) -> None:
    for record in found.records:
        record["time_s"] -= 3600


def late_pilot(found: Documents) -> None:
    (pilot,) = found.of("pilot")
    place = found.records.index(pilot)
    moved = found.records[place + 7]
    found.records[place : place + 8] = [*found.records[place + 1 : place + 8], pilot | {"time_s": moved["time_s"]}]


def lucky_turn(found: Documents) -> None:
    for record in found.of("block", arm="dp4", warmup=False):
        record["turns"]["prefill_s"][1] = round(0.8 * record["turns"]["prefill_s"][1], 9)


def fewer_turns(found: Documents) -> None:
    for record in found.of("block", warmup=False):
        for column in record["turns"].values():
            column.pop()


def kept_try(found: Documents) -> None:
    found.records = [r for r in found.records if r["kind"] != "rerun" and r.get("retry", 0) == 0]


def better_try(found: Documents) -> None:
    (rerun,) = found.of("rerun")
    place = found.records.index(rerun)
    del found.records[place - 6 : place + 1]
    for record in found.of("block", retry=1):
        record["retry"] = 0


def quiet(found: Documents) -> None:
    for record in found.of("block", retry=0):
        record["sentinels"]["gemm_s"] = [min(seconds, 0.0021) for seconds in record["sentinels"]["gemm_s"]]


BASE = ("tp2pp2", "tp2pp2 (A/A)", "tp2pp2 (+2 %)")
FORGED: dict[str, tuple[Callable[[Documents], None], str]] = {
    "an arm 10 % faster": (faster(0.9, "n2m2:batch", clocks=False), "time.idle"),
    "an arm 3 % faster": (faster(0.97, "n2m2:batch", clocks=False), "time.idle"),
    "the baseline 10 % slower": (faster(1.1, "tp2pp2", clocks=False), "time.blocks"),
    "one lucky block": (each("block", scaled(0.3), arm="tp4", launch=0, block=3), "time.blocks"),
    "the baseline alone slower, clocks moved": (faster(1.25, "tp2pp2", clocks=True), "twins.times"),
    "baseline and twin slower, clocks moved": (faster(1.9, *BASE, clocks=True), "time.pipeline"),
    "prefill beyond the devices": (faster(0.7, "dp4", clocks=True, phases=("prefill_s",)), "roofline.prefill"),
    "decode beyond the memory": (faster(0.8, "dp4", clocks=True, phases=("decode_s",)), "roofline.decode"),
    "the best block copied": (copied, "noise.copies"),
    "one arm made from another": (derived, "noise.copies"),
    "times made up to the millisecond": (lambda f: f.retime(rounded, "dp4"), "noise.digits"),
    "times multiplied and not rounded": (lambda f: f.retime(unrounded, "dp4"), "noise.digits"),
    "times without noise": (constant, "noise.spread"),
    "a bad block left out": (
        without(lambda r: r["kind"] == "block" and r["block"] == 3 and r["launch"] == 0),
        "blocks.order",
    ),
    "an arm's bad block left out": (without(lambda r: r.get("block") == 4 and r["arm"] == "tp4"), "blocks.order"),
    "a block measured once more": (again, "blocks.order"),
    "two arms of a block in another order": (swapped_blocks, "blocks.order"),
    "another order, declared afterwards": (swapped_design, "design.order"),
    "a warm-up block counted": (each("block", lambda r: r.update(warmup=False), block=0), "blocks.counts"),
    "a slow block called warm-up": (each("block", lambda r: r.update(warmup=True), block=2), "blocks.counts"),
    "the first launch dropped": (first_launch_dropped, "design.order"),
    "the second launch not there": (without(lambda r: r["launch"] == 1 and r["kind"] == "block"), "blocks.counts"),
    "labels of two arms exchanged": (renamed, "blocks.order"),
    "the last timing missing, but ended": (unfinished, "blocks.counts"),
    "an attempt that never was": (each("block", lambda r: r.update(attempt=1), launch=1), "journal.attempts"),
    "a position changed": (
        each("block", lambda r: r.update(position=(r["position"] + 1) % 6), block=1),
        "blocks.order",
    ),
    "a rank's times left out": (each("block", lambda r: r["prefill_s"].pop(), arm="tp4"), "blocks.counts"),
    "more ranks than there were": (designed(ranks=8), "blocks.counts"),
    "twice the decode steps": (worked(decode_steps=64), "blocks.counts"),
    "twice the batch": (worked(batch=256), "memory.predicted"),
    "a longer sequence": (worked(seq=10_100), "memory.predicted"),
    "another seed": (designed(seed=3), "design.order"),
    "an arm of another layout": (lambda f: f.design["arms"][-1].update(layout="n2m2:gather"), "memory.predicted"),
    "an error above its bound": (each("verify", error_beyond, arm="tp4"), "verify.numbers"),
    "a bound raised": (each("verify", bound_raised, arm="tp4"), "verify.numbers"),
    "a floor raised": (each("verify", floor_raised, arm="tp4"), "verify.numbers"),
    "an error beyond the dtype": (each("verify", too_exact, arm="tp4"), "verify.numbers"),
    "tokens that do not add up": (
        each("verify", lambda r: r["greedy"].update(matched=999), arm="dp4"),
        "verify.numbers",
    ),
    "fewer tokens compared": (each("verify", lambda r: r["greedy"].update(compared=9, matched=8)), "verify.numbers"),
    "verified in spite of its reason": (each("verify", lambda r: r.update(reason="?"), arm="dp4"), "verify.verdict"),
    "an unverified arm timed": (each("verify", unverify, arm="tp4"), "verify.verdict"),
    "a control that passes": (each("control", lambda r: r.update(relative_error=1e-3, sensitivity=1e-3)), "control"),
    "a control made sensitive": (each("control", lambda r: r.update(sensitivity=0.9)), "control"),
    "another control": (each("control", lambda r: r.update(layout="n1m4:independent")), "control"),
    "no control": (without(lambda r: r["kind"] == "control"), "journal.counts"),
    "a smaller cache": (
        each("memory", held("kv_cache_bytes", 0.5, predicted=True), arm="n2m2:batch"),
        "memory.predicted",
    ),
    "fewer parameters held": (each("memory", held("parameters_bytes", 0.5, predicted=False)), "memory.held"),
    "a lower peak": (each("memory", held("activations_peak_bytes", 0.4, predicted=False)), "memory.held"),
    "half the traffic": (
        each("traffic", ops(lambda op: op.update(bytes_per_rank=op["bytes_per_rank"] // 2)), arm="tp4"),
        "traffic.predicted",
    ),
    "a collective left out": (each("traffic", lambda r: r["ops"].pop(0), arm="tp4"), "traffic.predicted"),
    "a link faster than it is": (
        each("traffic", ops(lambda op: op.update(time_s=op["time_s"] and op["time_s"] / 9)), arm="tp4"),
        "communication.link",
    ),
    "a twin with other traffic": (each("traffic", ops(lambda op: op.update(time_s=1.0)), arm=BASE[1]), "twins.records"),
    "run on other devices": (
        each("launch", lambda r: r.update(device_names=["NVIDIA H100 80GB HBM3"] * 4)),
        "identity.devices",
    ),
    "run on smaller devices, everywhere": (h100, "memory.held"),
    "another input": (each("launch", lambda r: r.update(input_sha256="0" * 64)), "identity.input"),
    "other weights": (each("launch", lambda r: r.update(weights_sha256="0" * 64)), "identity.weights"),
    "run before it was designed": (ahead, "time.order"),
    "a launch that began too early": (each("launch", lambda r: r.update(start_s=900.0), launch=1), "time.order"),
    "nothing planted, said afterwards": (designed(planted=0.0), "design.planted"),
    "another layout slowed down": (lambda f: f.design["arms"][2].update(layout="tp4"), "design.planted"),
    "the planted arm as slow as a third more": (faster(1.3, BASE[2], clocks=True), "twins.times"),
    "sentinels left out": (each("block", lambda r: r.pop("sentinels"), block=2), "sentinels"),
    "sentinels of fewer ranks": (each("end", lambda r: r["sentinels"]["host_s"].pop()), "sentinels"),
    "sentinels that take too long": (each("end", lambda r: r["sentinels"].update(host_s=[0.1] * 4)), "sentinels"),
    "no pilot, said afterwards": (designed(pilot=None), "pilot.declared"),
    "another rule, declared afterwards": (
        lambda f: f.design["pilot"].update(block_s=5.0, most_block_s=20.0),
        "pilot.outcome",
    ),
    "the pilot left out": (without(lambda r: r["kind"] == "pilot"), "pilot.declared"),
    "the pilot of another arm": (each("pilot", lambda r: r.update(arm="dp4")), "pilot.declared"),
    "a pilot behind a timed block": (late_pilot, "pilot.declared"),
    "fewer turns than the pilot gives": (each("pilot", lambda r: r.update(turns=2)), "pilot.outcome"),
    "less dependence than the pilot shows": (each("pilot", lambda r: r.update(tau_int=0.1)), "pilot.outcome"),
    "a pilot cut short": (each("pilot", lambda r: [r[k].pop() for k in ("prefill_s", "decode_s")]), "pilot.outcome"),
    "a pilot in no time": (each("pilot", lambda r: r.update(decode_s=[9.1] * 4)), "pilot.outcome"),
    "a turn of each block left out": (fewer_turns, "blocks.turns"),
    "lucky turns that are not in the mean": (lucky_turn, "blocks.turns"),
    "a block's time without its turns": (
        each("block", lambda r: r.update(prefill_s=[1.1 * s for s in r["prefill_s"]]), arm="tp4"),
        "blocks.turns",
    ),
    "the first try kept, the other left out": (kept_try, "blocks.rerun"),
    "the better try alone": (better_try, "time.blocks"),
    "run again without a cause": (quiet, "blocks.rerun"),
    "a band that nothing is out of": (
        each("pilot", lambda r: r["sentinels"].update(gemm_s=[2e-3 + 1.3e-4 * n for n in range(10)])),
        "blocks.rerun",
    ),
    "other readings of the warm-up": (
        each("pilot", lambda r: r["sentinels"]["gemm_s"].__setitem__(0, 3e-3)),
        "pilot.outcome",
    ),
    "called to be run again elsewhere": (each("rerun", lambda r: r.update(block=2)), "blocks.rerun"),
    "a field missing": (each("verify", lambda r: r.pop("greedy"), arm="tp4"), "malformed"),
}
