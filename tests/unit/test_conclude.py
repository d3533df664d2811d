"""The end of a run: what is written can be made again from the files alone."""

import json

from run_fixture import make_design, make_env, make_records

from headgrid.experiment.stats import summarise
from headgrid.report.html import render


def test_summary_survives_json() -> None:
    """A report made from summary.json equals one made from the summary in memory."""
    design = make_design(launches=1, blocks=2)
    records = make_records(design)
    summary = summarise(design, records)
    documents = json.loads(json.dumps([design, make_env(), records, summary], allow_nan=False))
    assert render(*documents) == render(design, make_env(), records, summary)
