"""Activation peaks of layouts whose prediction is a bound, not a figure."""

import dataclasses
from pathlib import Path

import pytest

from headgrid.experiment.check.predictions import memory
from headgrid.experiment.check.run import open_folder
from headgrid.layout.layout import parse_layout
from headgrid.layout.memory import predict


def found(run: Path, text: str, share: float, device: str = "cuda") -> list[str]:
    """What is said of ranks that hold `share` of the activations predicted, all else as predicted."""
    whole, layout = open_folder(run, None), parse_layout(text)
    assert whole.model is not None and whole.workload is not None
    predicted = [dataclasses.asdict(predict(whole.model, layout, whole.workload, r)) for r in range(layout.ranks)]
    held = [each | {"activations_peak_bytes": int(share * each["activations_peak_bytes"])} for each in predicted]
    record = {"kind": "memory", "launch": 0, "arm": text, "per_rank": held, "predicted": predicted}
    design = whole.design | {"arms": [{"label": text, "layout": text, "role": "arm"}], "device": device}
    said = memory(dataclasses.replace(whole, design=design, records=[record]))
    return [getattr(each, "gate", str(each)) for each in said]


@pytest.mark.parametrize(
    ("text", "share", "device"),
    [
        ("n2m2:batch", 1.0, "cuda"),
        ("n2m2:batch+overlapped", 0.55, "cuda"),
        ("n2m2:batch+fp8", 0.2, "cuda"),
        ("n2m2:batch+gathered+overlapped+fp8", 0.2, "cuda"),
        ("n2m2:batch+fp8", 1.0, "cpu"),
    ],
)
def test_a_bound_need_not_be_reached(untouched: Path, text: str, share: float, device: str) -> None:
    assert found(untouched, text, share, device) == []


@pytest.mark.parametrize(
    ("text", "share", "device"),
    [
        ("n2m2:batch", 0.55, "cuda"),
        ("n2m2:batch+overlapped", 0.4, "cuda"),
        ("n2m2:batch+overlapped", 2.0, "cuda"),
        ("n2m2:batch+fp8", 2.0, "cuda"),
        ("n2m2:batch+fp8", 0.5, "cpu"),
    ],
)
def test_what_cannot_be_held_is_rejected(untouched: Path, text: str, share: float, device: str) -> None:
    assert set(found(untouched, text, share, device)) == {"memory.held"}
