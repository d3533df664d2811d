"""How large a report page may become: below a megabyte for nine arms, whatever the protocol."""

import pytest
from run_fixture import ARMS, make_design, make_env, make_records

from headgrid.experiment.stats import summarise
from headgrid.report.html import render


@pytest.mark.parametrize(("launches", "blocks"), [(5, 8), (1, 200)])
def test_nine_arms_stay_below_a_megabyte(launches: int, blocks: int) -> None:
    """By the default protocol in five launches, and with more blocks than a page lists, as with the seed's 1000."""
    extra = [{"label": f"n4m4:batch+{n}", "layout": "n4m4:batch", "role": "arm"} for n in range(4)]
    design = make_design(arms=[*ARMS, *extra], launches=launches, blocks=blocks)
    like = {f"n4m4:batch+{n}": ARMS[2]["label"] for n in range(4)}
    records = make_records(make_design(launches=launches, blocks=blocks))
    records += [{**r, "arm": label} for label, arm in like.items() for r in records if r.get("arm") == arm]
    source = render(design, make_env(), records, summarise(design, records))
    assert len(source.encode()) < 1_000_000
    assert ("too many to list" in source) == (blocks == 200)
