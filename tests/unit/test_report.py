"""The report: complete, truthful about what is unknown, inert whatever the labels are, and readable by a browser."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from statistics import correlation
from typing import Any

import pytest
from report_fixture import HOSTILE, Reader, hostile_page, page
from run_fixture import ARMS, make_design, make_env, make_records, pipeline
from telemetry_fixture import Run

from headgrid.experiment.design import analysis_of
from headgrid.experiment.isolation import judge
from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import block_times
from headgrid.experiment.stats import summarise
from headgrid.experiment.summary import summary_of
from headgrid.report import format as fmt
from headgrid.report.html import outcome, render
from headgrid.report.pairs import DECLARED, EXPLORATORY, every_pair

DATA = {"type": "application/json", "id": "data"}


def embedded(source: str) -> dict[str, Any]:
    """The data of a page, as its script reads them."""
    return json.loads(source.partition('id="data">')[2].partition("</script>")[0])


@pytest.fixture(scope="module")
def good() -> Reader:
    return Reader(page())


# --- content ---------------------------------------------------------------------------------------------------------


def test_sections_come_in_the_promised_order(good: Reader) -> None:
    parts = [
        "compare: seed-small on 16 ranks",
        "Every arm computes what the reference computes",
        "Times of 16 ranks on 2 cores say nothing about GPUs",
        "Accuracy",
        "Negative control n4m4:independent",
        "Performance metrics",
        "Statistical analysis: prefill",
        "Memory per rank, MiB",
        "Communication breakdown: prefill",
        "Validation checks",
        "Prefill throughput",
        "Pipeline of tp8pp2, decode",
        "Who owns what",
        "What was run",
    ]
    places = [good.text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_figures_of_one_arm_by_hand() -> None:
    """One arm, one launch, blocks of exactly 0.5 s: 16 x 128 / 0.5 = 4,096 tok/s; 8 steps in 0.08 s = 10 ms each."""
    design = make_design(arms=ARMS[:1], launches=1, blocks=2, warmup_blocks=0)
    records = make_records(design)
    for record in records:
        if record["kind"] == "block":
            record.update(prefill_s=[0.5, 0.4], decode_s=[0.07, 0.08])
    text = Reader(page(design, records)).text
    # without any spread: six significant digits, an interval of no width, decode TPS 16 / 10 ms
    rates = "4,096.00 4,096.00 to 4,096.00 0.00 1,600.00 1,600.00 to 1,600.00 10.0000 10.0000 to 10.0000 0.0000 2"
    assert f"tp8pp2 {rates} " in text
    assert "15.0 MiB 24.5 ms 7.50 MiB 12.3 ms" in text, "two layers on a stage of four layers: half per layer"


def test_the_seeds_statistics_are_labelled(good: Reader) -> None:
    assert "seed's p (not trusted)" in good.text and "seed's d (not trusted)" in good.text
    assert "as the seed computes them" in good.text


def test_unverified_arm_shows_no_times() -> None:
    text = Reader(page(unverified=("n4m4:batch",))).text
    assert "n4m4:batch is not verified (prefill: relative error 0.78 is above the bound" in text
    table = text[text.index("Performance metrics") : text.index("Statistical analysis")]
    row = table[table.index("n4m4:batch") : table.index("n4m4:gather")]
    assert row.count("not measured") == 9 and not re.search(r"\d", row.removeprefix("n4m4:batch"))
    assert "N4m4:batch failed the check" in text


def test_unknown_is_said_never_blank_or_nan() -> None:
    design = make_design(launches=1, blocks=1)
    one_block = Reader(page(design))
    nothing = Reader(page(design, []))
    for reader in (one_block, nothing):
        assert "not measured" in reader.text
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None|null|undefined)\b", reader.text)
    cells = re.findall(r"<tbody[^>]*>.*?</tbody>", page(design, []), re.DOTALL)
    assert cells and not any("></td>" in body for body in cells)
    assert "no arm has been checked" in nothing.text.lower()


def test_missing_figures_in_records_are_said() -> None:
    design = make_design()
    records = make_records(design)
    for record in records:
        if record["kind"] == "memory":
            record["per_rank"] = [{**rank, "kv_cache_bytes": None} for rank in record["per_rank"]]
        if record["kind"] == "traffic":
            record["ops"] = [{**op, "time_s": None} for op in record["ops"]]
        if record["kind"] == "verify":
            record["phases"]["decode"] = dict.fromkeys(record["phases"]["decode"])
            record.update(greedy=None)
        if record["kind"] == "control":
            record.update(sensitivity=None)
    text = Reader(page(design, records)).text
    assert not re.search(r"\b(nan|None|null)\b", text)
    assert text.count("not measured") > 40


def test_accepted_control_shouts() -> None:
    design = make_design()
    records = make_records(design)
    next(record for record in records if record["kind"] == "control").update(rejected=False)
    text = Reader(page(design, records)).text
    assert "NOT rejected" in text and "no verdict on accuracy in this run can be trusted" in text


@pytest.mark.parametrize(
    ("speed", "words"),
    [(0.8, "n4m4:batch handled 25.0"), (1.25, "every other layout was slower"), (1.0, "as fast as tp8pp2, within 1.0")],
)
def test_outcome_in_plain_words(speed: float, words: str) -> None:
    design = make_design(arms=ARMS[:3], device="cuda")
    records = make_records(design, noise=0.0)
    for record in records:
        if record["kind"] == "block":
            factor = speed if record["arm"] == "n4m4:batch" else 1.0
            record.update(prefill_s=[factor], decode_s=[factor])
    sentence = outcome(summarise(design, records), design["margin"])
    assert words in sentence.replace("\N{NO-BREAK SPACE}", " "), sentence
    assert sentence.count(". ") == 0


def test_layout_that_cannot_be_drawn_is_named() -> None:
    design = make_design(arms=[*ARMS, {"label": "odd", "layout": "x9", "role": "arm"}])
    assert "Not drawn: 'x9' is not a layout" in Reader(page(design)).text


@pytest.mark.parametrize("layout", ["dp16", "tp16", "n1m4dp4:batch", "n2m4pp2:gather", "n3m5:gather", "n1m1"])
def test_partitions_cover_all_heads_and_channels(layout: str) -> None:
    """The areas of the boxes add up to the whole grid: nothing is left out, nothing is drawn twice."""
    design = make_design(arms=[{"label": "only", "layout": layout, "role": "baseline"}], ranks=16)
    source = page(design, [])
    drawing = source[source.index("Who owns what") :]
    boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', drawing)
    area = sum(float(width) * float(height) for _, width, height in boxes)
    assert area == pytest.approx((374 - 46 - 8) * (300 - 6 - 34), rel=5e-3)


def test_copied_kv_heads_are_said() -> None:
    model = {**make_design()["model"], "num_kv_heads": 2}
    text = Reader(page(make_design(model=model))).text
    assert "2 KV heads, each stored 8 times." in text  # tp16
    assert "2 KV heads, each stored 2 times." in text  # n4m4


def test_timeline_shows_each_micro_batch() -> None:
    design = make_design()
    records = [*make_records(design), pipeline(0, "n4m4:batch", stages=3, micro_batches=5)]
    source = page(design, records)
    assert (
        "stage 2 runs micro-batches 0, 1, 2, 3, 4;" in source or "stage 2 runs micro-batches 0, 1, 2, 3, 4." in source
    )


# --- safety ----------------------------------------------------------------------------------------------------------


def test_hostile_names_are_inert() -> None:
    source = hostile_page()
    reader = Reader(source)
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [DATA, {}], "ours, and no other"
    assert "img" not in {tag for tag, _ in reader.tags}
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in reader.text, "shown as the text that it is"
    assert html.escape("<script>alert(1)</script>") in source


def test_names_do_not_turn_round_what_follows_them() -> None:
    """Overrides of direction, separators and control characters are shown by their numbers, drawn or embedded too."""
    assert any(character in HOSTILE for character in "\u202e\u2066\u2028\x1b")
    source = hostile_page()
    assert not re.search("[\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]", source)
    assert "⟨U+202E⟩" in Reader(source).text
    source.encode("utf-8")  # also halves of a pair


def test_embedded_data_is_the_runs() -> None:
    design = make_design()
    records = make_records(design, unverified=("tp16",))
    data = embedded(page(design, records))
    assert [arm["label"] for arm in data["arms"]] == [arm["label"] for arm in ARMS]
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["blocks"]]
    numbers = {arm["label"]: number for number, arm in enumerate(data["arms"])}
    assert {row["arm"] for row in rows} == {0, 1, 2, 3} and numbers["tp16"] == 4, "no times of what is not verified"
    for label, phase in (("n4m4:batch", "prefill"), ("tp8pp2", "decode")):
        mine = {
            (r["launch"], r["block"]): r[f"{phase}_s"] for r in rows if r["arm"] == numbers[label] and not r["warm_up"]
        }
        assert mine == block_times(records, label, phase)
    assert sum(row["warm_up"] for row in rows) == 4 * design["launches"] * design["warmup_blocks"]
    assert all(square[numbers["tp16"]][0][0] == "not measured" for square in data["pairs"].values())


def test_the_script_is_allowed_by_its_hash_and_by_nothing_else() -> None:
    source = page()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', source)
    script = source.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    expected = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:;"
    assert policy == f"{expected} base-uri 'none'; form-action 'none'"
    unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|fetch|\bimport\b|Storage"
    assert not re.search(unsafe, script)
    assert "<!--" not in script and len(script.splitlines()) < 400


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_of_the_summary_are_copied_and_the_others_computed_alike() -> None:
    """Each other pair against the summary of a design whose baseline makes it a declared one."""
    design = make_design()
    records = make_records(design)
    summary = summarise(design, records)
    squares = every_pair(summary, records, design["margin"], analysis_of(design))
    own = {(row["phase"], row["a"], row["b"]): row for row in summary["comparisons"]}
    labels = [arm["label"] for arm in design["arms"]]
    kinds = [row[-1] for square in squares.values() for line in square for row in line if row]
    assert {kind: kinds.count(kind) for kind in kinds} == {DECLARED: 2 * 2 * 7, EXPLORATORY: 2 * 2 * 3}
    for base in labels:
        roles = [{**arm, "role": "baseline" if arm["label"] == base else "arm"} for arm in design["arms"]]
        for row in summarise({**design, "arms": roles}, records)["comparisons"]:
            found = squares[row["phase"]][labels.index(row["a"])][labels.index(row["b"])]
            ratio, ci95 = fmt.ratio(row["ratio"], row["ci95"])
            said = claimed(own.get((row["phase"], row["a"], row["b"]), {"verdict": row["verdict"]}))
            assert found is not None and found[:3] == (ratio, ci95, said)


def test_a_pair_the_other_way_round_is_its_inverse() -> None:
    design = make_design()
    records = make_records(design)
    summary = summarise(design, records)
    square = every_pair(summary, records, design["margin"], analysis_of(design))["prefill"]
    row = next(row for row in summary["comparisons"] if row["verdict"] == "faster" and row["phase"] == "prefill")
    labels = [arm["label"] for arm in design["arms"]]
    turned = square[labels.index(row["b"])][labels.index(row["a"])]
    assert turned is not None and turned[2] == "slower"
    assert turned[:2] == fmt.ratio(1 / row["ratio"], [1 / row["ci95"][1], 1 / row["ci95"][0]])


# --- drawings over time ----------------------------------------------------------------------------------------------


def test_marks_of_blocks_are_where_their_times_put_them() -> None:
    """Height against seconds: within an arm's row a straight line, up being slower, warm-up apart."""
    design = make_design()
    records = make_records(design)
    source = page(design, records)
    rows = embedded(source)["blocks"]
    drawing = source[source.index("Prefill blocks as they ran") :].partition("</svg>")[0]
    places = re.findall(r'<use [^>]*?y="([\d.]+)"[^>]*? data-point="(\d+)"', drawing)
    assert sorted(int(point) for _, point in places) == list(range(len(rows)))
    heights = {int(point): float(y) for y, point in places}
    for arm in (0, 2):
        mine = [(n, row) for n, row in enumerate(rows) if row[0] == arm and not row[4]]
        seconds, ys = [row[5] for _, row in mine], [heights[n] for n, _ in mine]
        assert correlation(seconds, ys) < -0.9999
        assert correlation(seconds[1:], ys[:-1]) > -0.9, "the same of other blocks is no line: the test can fail"


def test_flagged_blocks_are_marked_and_named() -> None:
    design = make_design()
    records = make_records(design)
    summary = summarise(design, records)
    flag = {"launch": 1, "block": 2, "arm": "tp16", "verdict": "SUSPECT", "codes": ["CPU_STEAL"]}
    summary["isolation"] = judge(design, records, None) | {"flagged": [flag]}
    source = render(design, make_env(), records, summary)
    flagged = [row for row in embedded(source)["blocks"] if row[-1]]
    assert [row[:3] + row[-2:] for row in flagged] == [[4, 1, 2, "SUSPECT", "CPU_STEAL"]]
    assert source.count("Red rings") == 2 and "Red rings" not in page(design, records)


def test_telemetry_is_drawn_from_the_first_timed_block_on() -> None:
    run = Run(blocks=3)
    summary = summary_of(run.design, run.records, run.telemetry)
    with_samples = render(run.design, make_env(), run.records, summary, run.telemetry)
    assert "Telemetry over time: SM clock 1,755 to 1,755 MHz" in with_samples
    assert with_samples.count("decode, ") >= 9 and "Telemetry over time" not in render(
        run.design, make_env(), run.records, summary
    )


def test_page_refers_to_nothing_outside(good: Reader) -> None:
    allowed = re.compile(r"^(#|data:)")
    for tag, attributes in good.tags:
        for key, value in attributes.items():
            assert (tag, key) != ("script", "src")
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert allowed.match(value or ""), (tag, key, value)
            assert "url(http" not in (value or "")
    assert {tag for tag, _ in good.tags} & {"iframe", "object", "embed", "base", "form"} == set()


def test_ids_are_unique_and_references_resolve() -> None:
    source = page()
    ids = re.findall(r'\sid="([^"]+)"', source)
    assert len(ids) == len(set(ids)) > 50
    assert set(re.findall(r"url\(#([^)]+)\)", source)) | set(re.findall(r'href="#([^"]+)"', source)) <= set(ids)


def test_every_drawing_has_a_text_alternative(good: Reader) -> None:
    drawings = [attributes for tag, attributes in good.tags if tag == "svg"]
    assert len(drawings) == 12  # 2 bars, 2 ratios, 2 of blocks, 2 timelines, 4 layouts
    assert all(drawing["role"] == "img" and len(drawing["aria-label"] or "") > 40 for drawing in drawings)
    assert all("viewbox" in drawing and "width" not in drawing for drawing in drawings)


def test_colours_follow_the_page() -> None:
    source = page()
    assert not re.search(r"#010[23]0[0-9a-f]", source), "a placeholder colour was not replaced"
    used, defined = set(re.findall(r"var\((--\w+)\)", source)), set(re.findall(r"(--\w+):", source))
    assert used <= defined and "--s1" in used


def test_same_input_same_page() -> None:
    assert page() == page()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fmt.significant(1234567.0, 3), "1,234,567"),
        (fmt.significant(0.012345), "0.0123"),
        (fmt.significant(0.0), "0"),
        (fmt.significant(None), "not measured"),
        (fmt.significant(float("nan")), "not measured"),
        (fmt.scientific(4.51e-7), f"4.5\N{NO-BREAK SPACE}{fmt.TIMES}\N{NO-BREAK SPACE}10⁻⁷"),
        (fmt.scientific(0.79), f"7.9\N{NO-BREAK SPACE}{fmt.TIMES}\N{NO-BREAK SPACE}10⁻¹"),
        (fmt.scientific(0), "0"),
        (fmt.duration(0.0105), "10.5 ms"),
        (fmt.duration(0.00021), "210 µs"),
        (fmt.duration(2.0), "2.00 s"),
        (fmt.size(0), "0 B"),
        (fmt.size(960 * 1024), "960 KiB"),
        (fmt.size(3.5 * 2**30), "3.50 GiB"),
        (fmt.change(-0.127), "\N{MINUS SIGN}12.70\N{NO-BREAK SPACE}%"),
        (fmt.p_value(1e-9), "< 0.001"),
        (fmt.p_value(0.0392), "0.039"),
        (fmt.ranks([0, 1, 2, 5, 7, 8]), "0 to 2, 5, 7 to 8"),
        (fmt.plain(["H200"] * 8), f"8 {fmt.TIMES} H200"),
        (fmt.plain(float("inf")), "not measured"),
        (fmt.plain(False), "no"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_column_shares_its_decimals() -> None:
    wide = {"mean": 3298.41, "sd": 300.0, "ci95": [3000.0, 3596.8]}
    narrow = {"mean": 4161.02, "sd": 1.3, "ci95": [4159.4, 4162.6]}
    assert fmt.figures([wide, None, narrow]) == [
        ("3,298.4", "3,000.0 to 3,596.8", "300.0"),
        ("not measured", "not measured", "not measured"),
        ("4,161.0", "4,159.4 to 4,162.6", "1.3"),
    ]


# --- imports ---------------------------------------------------------------------------------------------------------


def test_report_does_not_load_torch() -> None:
    code = "import sys; import headgrid.report.html; sys.exit(bool({'torch', 'matplotlib.pyplot'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
