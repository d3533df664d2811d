"""The traces' structure: Trace Event Format, as ui.perfetto.dev and chrome://tracing take it."""

import gzip
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headgrid.experiment.breakdown.perfetto import Bar, document, file_name, first_bars, packed


def faults(trace: Any) -> list[str]:
    """What a viewer would not draw, or draw wrongly: fields, numbers, names of threads, bars that cut each other."""
    found: list[str] = []
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}
    for event in trace["traceEvents"]:
        if event["ph"] not in ("M", "X"):
            found.append(f"phase {event['ph']}")
        if event["ph"] != "X":
            continue
        if not (isinstance(event["name"], str) and event["name"] and isinstance(event["cat"], str)):
            found.append("a bar without a name")
        if not (event["ts"] >= 0 and event["dur"] >= 0):
            found.append(f"{event['name']} at {event['ts']} for {event['dur']}")
        if event["pid"] not in processes or (event["pid"], event["tid"]) not in named:
            found.append(f"{event['name']} is on a thread without a name")
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for bars in threads.values():
        if [start for start, _ in bars] != sorted(start for start, _ in bars):
            found.append("bars are not in order")
        around: list[float] = []
        for start, end in bars:
            while around and around[-1] <= start + 1e-9:
                around.pop()
            if around and around[-1] < end - 1e-9:
                found.append(f"a bar from {start} to {end} cuts one that ends at {around[-1]}")
            around.append(end)
    return found


def read(trace: Any) -> Any:
    return json.loads(gzip.decompress(packed(trace)))


def bar(track: str, start: int, end: int, name: str = "kernel", category: str = "compute") -> Bar:
    return Bar(track, name, start, end, category, {"bytes": 8})


drawn = st.lists(
    st.tuples(st.sampled_from(["stream 7", "stream 20"]), st.integers(0, 40), st.integers(0, 15)), max_size=12
)


@given(drawn)
@settings(max_examples=200, deadline=None)
def test_whatever_overlaps_is_drawn_whole(triples: list[tuple[str, int, int]]) -> None:
    bars = [bar(track, start, start + length) for track, start, length in triples]
    trace = read(document([("rank 0", bars), ("rank 1", bars[::-1])], {"phase": "prefill"}))
    assert faults(trace) == []
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * len(bars)
    found = sorted((round(e["ts"] * 1e3), round(e["dur"] * 1e3)) for e in events if e["pid"] == 0)
    assert found == sorted((b.start, b.end - b.start) for b in bars)


def test_a_viewer_sees_ranks_and_streams_by_name() -> None:
    bars = [bar("stream 20", 5, 9), bar("stream 7", 1, 4), bar("stream 7", 2, 6)]
    trace = read(document([("rank 0 (slice 0)", bars)], {"layout": "n1m2:batch"}))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and "name" in e["args"]]
    assert names == ["rank 0 (slice 0)", "stream 7", "stream 7 (2)", "stream 20"]
    assert trace["otherData"] == {"layout": "n1m2:batch"}


def test_the_judge_can_reject() -> None:
    good = document([("rank 0", [bar("a", 0, 10_000), bar("a", 2_000, 5_000)])], {})
    assert faults(good) == []
    for change in ({"dur": 20.0, "name": "inner"}, {"ts": -1.0}, {"tid": 9}, {"name": ""}, {"ph": "B"}):
        events = [dict(event) for event in good["traceEvents"]]
        events[-1] |= change
        assert faults({"traceEvents": events}), change


def test_long_traces_are_cut_by_time_and_say_so() -> None:
    bars = [bar("a", start, start + 1) for start in (5, 1, 9, 3)]
    kept, cut = first_bars(bars, 2)
    assert [each.start for each in kept] == [1, 3] and cut == "the first 2 of 4 events of a rank"
    assert first_bars(bars, 4) == (bars, None)


def test_files_are_named_after_layout_and_phase_and_always_the_same() -> None:
    assert file_name("n2m2:batch+gathered", "decode") == "traces/n2m2-batch-gathered-decode.json.gz"
    trace = document([("rank 0", [bar("a", 0, 5)])], {})
    assert packed(trace) == packed(trace)
