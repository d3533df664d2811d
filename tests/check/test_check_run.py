"""`check` accepts untouched runs and rejects every tampered one, for the reason that was tampered with."""

import copy
import itertools
import random
from pathlib import Path

import honest_run
import pytest
import tamperings

from headgrid.errors import InvalidInput
from headgrid.experiment.check.check import RUN_GATES, check_run
from headgrid.experiment.check.finding import Verdict
from headgrid.experiment.journal import seal
from headgrid.experiment.records import done_blocks

BENCHMARKS = sorted(path.parent for path in (Path(__file__).parents[2] / "benchmarks").glob("*/journal.jsonl"))


def checked(folder: Path, published: str | None = None) -> Verdict:
    return check_run(folder, source_sha256=honest_run.SOURCE, published=published)


def test_there_are_enough_tamperings() -> None:
    assert len(tamperings.CRUDE) + len(tamperings.FORGED) >= 50 and len(tamperings.FORGED) >= 30


def test_accepts_an_untouched_run_with_all_its_gates(untouched: Path) -> None:
    verdict = checked(untouched)
    assert verdict.findings == () and verdict.notes == ()
    assert verdict.gates == tuple(RUN_GATES)


@pytest.mark.parametrize("folder", BENCHMARKS, ids=lambda path: path.name)
def test_accepts_the_runs_worth_keeping(folder: Path) -> None:
    verdict = check_run(folder, source_sha256=honest_run.SOURCE)
    assert verdict.findings == ()
    unchained = any(note.startswith("not chained (older schema)") for note in verdict.notes)
    assert unchained is (seal(folder / "journal.jsonl").unchained > 0)


def test_making_everything_again_without_a_change_is_accepted(run: Path) -> None:
    """The forger's tools alone are no reason to reject: what is found below is the change."""
    tamperings.forge(run, lambda found: None)
    assert checked(run).findings == ()


@pytest.mark.parametrize("name", tamperings.CRUDE)
def test_rejects_edited_files(run: Path, name: str) -> None:
    tamper, reason = tamperings.CRUDE[name]
    tamper(run)
    assert reason in checked(run).reasons


@pytest.mark.parametrize("name", tamperings.FORGED)
def test_rejects_forgeries_whose_hashes_and_summaries_were_made_again(run: Path, name: str) -> None:
    change, reason = tamperings.FORGED[name]
    tamperings.forge(run, change)
    verdict = checked(run)
    assert reason in verdict.reasons
    assert not {"journal.chain", "journal.seal", "design.hash", "environment.hash"} & set(verdict.reasons)


def test_what_no_check_can_detect_needs_a_published_link(run: Path) -> None:
    """A small change with all clocks moved contradicts nothing; the link that was published before does."""
    before = seal(run / "journal.jsonl").link
    tamperings.forge(run, tamperings.faster(0.97, "n2m2:batch", clocks=True))
    assert checked(run).findings == ()
    assert checked(run, published=before[:12]).reasons == ("journal.published",)
    assert checked(run, published=seal(run / "journal.jsonl").link).findings == ()


def retimed(record: tamperings.Record, after_s: float, draw: random.Random) -> None:
    """A block of the same times but for some ten microseconds, right behind the record ahead."""
    turns, idle_s = record["turns"], 0.002 if record["arm"] != tamperings.BASE[2] else 5.1
    for phase in ("prefill_s", "decode_s"):
        factor = 1 + 1e-5 * draw.random()
        for times in (record, turns):
            times[phase] = [round(seconds * factor, 9) for seconds in times[phase]]
    now = after_s + 0.006
    for n in range(len(turns["prefill_s"])):
        turns["prefill_start_s"][n] = now
        turns["decode_start_s"][n] = now + turns["prefill_s"][n] + idle_s
        now = turns["decode_start_s"][n] + turns["decode_s"][n] + 0.002
    record.update({key: turns[key][0] for key in ("prefill_start_s", "decode_start_s")})
    record["time_s"] = now + 0.001


@pytest.mark.parametrize("count", [12, 30, 45])
def test_accepts_a_run_that_was_killed_and_resumed(run: Path, count: int) -> None:
    """A launch that is begun again: another attempt, only the blocks that are missing, warm-up once more."""

    def resume(found: tamperings.Documents) -> None:
        whole = [record for record in found.records if record["launch"] == 0]
        cut = copy.deepcopy(whole[:count])
        done = done_blocks(cut, 0)
        moved = cut[-1]["time_s"] - whole[0]["time_s"] + 30
        later = [record | {"time_s": record["time_s"] + moved} for record in whole]
        later = [record for record in later if record.get("block") not in done]
        if pilot := [
            record for record in cut if record["kind"] == "pilot"
        ]:  # made once: it then holds for warm-up, too
            later = [record for record in later if record["kind"] != "pilot"]
            for record in (record for record in later if record.get("warmup")):
                columns = record["turns"]
                record["turns"] = {key: values * pilot[0]["turns"] for key, values in columns.items()}
        for record in later:
            record.update({"attempt": 1} if record["kind"] in ("launch", "block") else {})
        draw = random.Random(count)
        for before, record in itertools.pairwise(later):  # what is left out took no time
            if record["kind"] == "block":
                retimed(record, before["time_s"], draw)
            elif record["kind"] == "pilot":
                times = [record[phase] for phase in ("prefill_s", "decode_s")]
                record["time_s"] = before["time_s"] + sum(map(sum, [*times, *record["sentinels"].values()])) + 0.01
            elif before["kind"] == "block":
                record["time_s"] = before["time_s"] + 0.007
        later[0]["started_s"] = cut[-1]["time_s"] + 20
        rest = [r | {"time_s": r["time_s"] + moved + 300} for r in found.records if r["launch"] == 1]
        for record in rest:
            for mark in ("started_s", "prefill_start_s", "decode_start_s"):
                record.update({mark: record[mark] + moved + 300} if mark in record else {})
                if mark in record.get("turns", {}):
                    record["turns"][mark] = [start + moved + 300 for start in record["turns"][mark]]
        found.records = [*cut, *later, *rest]

    tamperings.forge(run, resume)
    verdict = checked(run)
    assert list(verdict.findings) == []
    assert verdict.examined["launch"] == 3


def test_a_run_that_is_not_done_is_accepted_and_called_incomplete(run: Path) -> None:
    def cut(found: tamperings.Documents) -> None:
        found.records = found.records[: len(found.records) // 2 + 9]

    tamperings.forge(run, cut)
    verdict = checked(run)
    assert verdict.findings == () and any("incomplete" in note for note in verdict.notes)


def test_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a run folder"):
        check_run(tmp_path)
    (tmp_path / "design.json").write_text("[]")
    with pytest.raises(InvalidInput, match="not a JSON object"):
        check_run(tmp_path)


def test_accepts_that_rank_0_leaves_a_barrier_last(run: Path) -> None:
    """Its stamps are then later than the others' durations began: seen on cores that many ranks shared."""

    def late(found: tamperings.Documents) -> None:
        for record in found.of("block", arm="tp4"):
            for phase in ("prefill", "decode"):
                record[f"{phase}_start_s"] += 0.03
                record["turns"][f"{phase}_start_s"] = [at + 0.03 for at in record["turns"][f"{phase}_start_s"]]
                record[f"{phase}_s"][0] = round(record[f"{phase}_s"][0] - 0.03, 9)

    tamperings.forge(run, late)
    assert list(checked(run).findings) == []
