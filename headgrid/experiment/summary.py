"""summary.json: what the journal supports, what was sampled beside it, and whether the machine was left to the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from headgrid.experiment.breakdown.summary import sentences as breakdown_sentences
from headgrid.experiment.breakdown.summary import summarise_breakdown
from headgrid.experiment.ceilings import summarise_ceilings, unsettled
from headgrid.experiment.environments import differences
from headgrid.experiment.isolation import judge, sentences
from headgrid.experiment.records import Record
from headgrid.experiment.reruns import summarise_pilot
from headgrid.experiment.stats import summarise
from headgrid.experiment.telemetry import Telemetry
from headgrid.experiment.telemetry_summary import summarise_telemetry, unsampled


def summary_of(
    design: Mapping[str, Any],
    records: Sequence[Record],
    telemetry: Telemetry | None,
    env: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All of summary.json but `run`. Pure: the same documents make the same summary, so it can always be made again.

    `telemetry` is what `headgrid.experiment.telemetry.read` found in the run folder; None without any. `env` is
    env.json, of which only what hosts do not have in common is used.
    """
    summary, isolation = summarise(design, records), judge(design, records, telemetry)
    summary |= summarise_pilot(design, records, summary["comparisons"])
    summary["warnings"] += [*unsampled(records, telemetry), *differences(env), *sentences(isolation)]
    ceilings = summarise_ceilings(design, records, summary["arms"])
    summary["warnings"] += unsettled(ceilings)
    if breakdown := summarise_breakdown(design, records):  # journals of older versions have none
        summary["warnings"] += breakdown_sentences(breakdown)
        summary["breakdown"] = breakdown
    return summary | {
        "isolation": isolation,
        "telemetry": summarise_telemetry(design, records, telemetry),
        "ceilings": ceilings,
    }
