"""The ledger of the seed experiment's claims: made from the journals, and judged by its own rules."""

import importlib.util
import json
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VERDICTS = {"impossible as stated", "reproduced", "beaten", "not reproduced", "not tested"}


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seed_claims_script", ROOT / "benchmarks" / "claims.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(claims: ModuleType) -> dict[str, Any]:
    return tomllib.loads(claims.CLAIMS.read_text(encoding="utf-8"))


def test_the_page_is_what_the_journals_give(claims: ModuleType, data: dict[str, Any]) -> None:
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(data, claims.HERE), (
        "run: python benchmarks/claims.py, and read what has changed"
    )


def test_another_journal_gives_another_page_and_another_verdict(
    claims: ModuleType, data: dict[str, Any], tmp_path: Path
) -> None:
    """The control of the test above: times ten, and the page's own summaries left as they are."""
    for run in {spec["run"] for spec in data["quantities"].values() if "run" in spec}:
        shutil.copytree(claims.HERE / run, tmp_path / run)
    journal = tmp_path / "2026-11-22-seed-4xh200" / "journal.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    for record in records:
        if record["kind"] == "block" and record["arm"] == "n2m2:gather+concat":
            record["prefill_s"] = [seconds / 10 for seconds in record["prefill_s"]]
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    known = claims.Quantities(data, tmp_path)
    improvement = next(claim for claim in data["claims"] if claim["words"] == "Throughput Improvement: 31.7%")
    assert claims.judge(improvement, known).verdict == "beaten"
    assert claims.judge(improvement, claims.Quantities(data, claims.HERE)).verdict == "not reproduced"
    assert claims.page(data, tmp_path) != claims.PAGE.read_text(encoding="utf-8")


def test_every_claim_has_a_verdict_and_every_quantity_a_use(claims: ModuleType, data: dict[str, Any]) -> None:
    known = claims.Quantities(data, claims.HERE)
    judged = [claims.judge(claim, known) for claim in data["claims"]]
    assert {item.verdict for item in judged} <= VERDICTS
    silent = [c["words"] for c in data["claims"] if not any(key in c for key in ("bounds", "evidence", "because"))]
    assert not silent, "a claim without a figure, a bound or a reason"
    formulas = [c["value"] for c in data["claims"]]
    formulas += [e["formula"] for c in data["claims"] for e in (*c.get("evidence", ()), *c.get("bounds", ()))]
    unused = [name for name in known if not any(name in formula for formula in formulas)]
    assert not unused


def test_what_is_known_to_be_impossible_is_called_so(claims: ModuleType, data: dict[str, Any]) -> None:
    known = claims.Quantities(data, claims.HERE)
    verdicts = {claim["words"]: claims.judge(claim, known).verdict for claim in data["claims"]}
    for words in (
        "Baseline, per GPU: ~45GB parameters",
        "Baseline, total model memory: 720GB across 16 GPUs",
        "Proposed: TPOT 0.22 ms",
        "Effect Size: Cohen's d = 2.85 (large effect)",
        "Memory Efficiency: 3.2x better memory utilization per parameter",
        "Weak Scaling: Performance scales linearly to 32 GPUs",
    ):
        assert verdicts[words] == "impossible as stated", words
    assert verdicts["Baseline, per GPU: ~25GB activations"] != "impossible as stated"


@pytest.mark.parametrize(
    ("value", "better", "measured", "bound", "verdict"),
    [
        ("10", "higher", 10.4, None, "reproduced"),
        ("10", "higher", 12.0, None, "beaten"),
        ("10", "higher", 8.0, None, "not reproduced"),
        ("10", "lower", 8.0, None, "beaten"),
        ("10", "lower", 12.0, None, "not reproduced"),
        ("10", "same", 12.0, None, "not reproduced"),
        ("10", "same", None, None, "not tested"),
        ("10", "lower", 8.0, (">=", "9"), "beaten"),
        ("10", "lower", 8.0, (">=", "11"), "impossible as stated"),
        ("10", "lower", 8.0, ("<=", "9"), "impossible as stated"),
        ("10", "lower", None, ("==", "10.3"), "not tested"),
        ("10", "lower", None, ("==", "11"), "impossible as stated"),
    ],
)
def test_the_rules_of_a_verdict(
    claims: ModuleType, value: str, better: str, measured: float | None, bound: tuple[str, str] | None, verdict: str
) -> None:
    claim: dict[str, Any] = {"words": "w", "value": value, "unit": "", "better": better}
    if measured is not None:
        claim["evidence"] = [{"kind": "measured", "says": "", "formula": "here"}]
    if bound is not None:
        claim["bounds"] = [{"holds": bound[0], "formula": bound[1], "says": ""}]
    assert claims.judge(claim, {"here": claims.Figure(measured)}).verdict == verdict


def test_formulas_compute_show_and_refuse(claims: ModuleType) -> None:
    known = {"a": claims.Figure(2.0, (1.0, 3.0)), "b": claims.Figure(5.0), "c": claims.Figure(1.0, (0.0, 2.0))}
    found = claims.compute("(a + b) * 2 - sqrt(4)", known)
    assert (found.value, found.ci95) == (12.0, (10.0, 14.0))
    assert claims.compute("b / a", known).ci95 == (5 / 3, 5.0)
    assert claims.compute("a * c", known).ci95 is None  # two uncertain quantities: no interval is made up
    assert claims.compute("half(a)", known).value == 0.5
    assert claims.arithmetic("(a + b) * 2 - (b - 1)", known) == "(2 + 5) x 2 - (5 - 1)"
    for bad in ("__import__('os')", "a.value", "[a]", "unknown", "half(b)", "a if b else a"):
        with pytest.raises((ValueError, KeyError)):
            claims.compute(bad, known)
