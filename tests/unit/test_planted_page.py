"""Pages of runs with a planted arm, which is no contestant: with arms that failed, and pairs beside the tables."""

from test_protocol import SLOW, a_run

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.stats import summarise
from headgrid.report.html import render
from headgrid.report.pairs import DECLARED, EXPLORATORY, every_pair
from headgrid.report.resolving import contestants


def test_a_page_of_arms_that_are_not_verified() -> None:
    """The planted one is a column of nothing, with telemetry too."""
    design, records = a_run()
    records = [record | {"verified": False} if record["kind"] == "verify" else record for record in records]
    arms = [{"label": arm["label"], "phases": {"prefill": [], "decode": []}} for arm in design["arms"]]
    telemetry = {"arms": arms, "missing": [], "hz": 10.0, "samples": 3, "sampler_cpu_share": 0.0, "failures": []}
    summary = summarise(design, records) | {"run": "x", "telemetry": telemetry}
    page = render(design, {"cpu_count": 2}, records, summary)
    assert page.count('scope="col"') and f">{SLOW}</th>" not in page


def test_any_two_arms_are_told_as_the_tables_tell_them() -> None:
    design, records = a_run()
    summary = contestants(summarise(design, records))
    squares, labels = every_pair(summary, records, design["margin"], 2), [arm["label"] for arm in summary["arms"]]
    for row in summary["comparisons"]:
        cell = squares[row["phase"]][labels.index(row["a"])][labels.index(row["b"])]
        assert cell is not None and cell[2] == claimed(row)
        assert cell[-1] == (EXPLORATORY if row["family"] == "exploratory" else DECLARED)
