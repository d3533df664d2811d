"""The report: complete, truthful about what is unknown, inert whatever the labels are, and readable by a browser."""

import html
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_fixture import ARMS, make_design, make_env, make_records, pipeline

from headgrid.experiment.stats import summarise
from headgrid.report import format as fmt
from headgrid.report.html import outcome, render

HOSTILE = "<script>alert(1)</script>\"'$\\frac{1}{0}$ & <img src=x onerror=alert(2)>"


def page(design: dict[str, Any] | None = None, records: list | None = None, **changes: Any) -> str:
    design = design or make_design()
    records = make_records(design, **changes) if records is None else records
    return render(design, make_env(), records, summarise(design, records))


class Reader(HTMLParser):
    """Tags with their attributes, visible text, and whether all elements are closed in order."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


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
    cells = re.findall(r"<tbody>.*?</tbody>", page(design, []), re.DOTALL)
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


def hostile_page() -> str:
    arms = [{**arm, "label": f"{arm['label']} {HOSTILE}", "layout": arm["layout"]} for arm in ARMS]
    arms.append({"label": "z", "layout": HOSTILE, "role": "arm"})
    design = make_design(arms=arms, name=HOSTILE, protocol=HOSTILE, control=HOSTILE)
    design["model"]["name"] = HOSTILE
    records = make_records(design)
    for record in records:
        if record["kind"] == "verify":
            record["reason"] = HOSTILE
            record["verified"] = record["arm"] != "z"
        if record["kind"] == "traffic":
            record["ops"][0]["collective"] = HOSTILE
        if record["kind"] == "memory":
            record["measured_by"] = HOSTILE
    env = {**make_env(), HOSTILE: {HOSTILE: HOSTILE}}
    return render(design, env, records, summarise(design, records))


def test_hostile_names_are_inert() -> None:
    source = hostile_page()
    reader = Reader(source)
    names = {tag for tag, _ in reader.tags}
    assert "script" not in names and "img" not in names
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in reader.text, "shown as the text that it is"
    assert html.escape("<script>alert(1)</script>") in source


def test_page_refers_to_nothing_outside(good: Reader) -> None:
    allowed = re.compile(r"^(#|data:)")
    for tag, attributes in good.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert allowed.match(value or ""), (tag, key, value)
            assert "url(http" not in (value or "")
    assert {tag for tag, _ in good.tags} & {"script", "iframe", "object", "embed", "base", "form"} == set()


def test_policy_forbids_everything_but_inline_style(good: Reader) -> None:
    (policy,) = [a["content"] for tag, a in good.tags if tag == "meta" and a.get("http-equiv")]
    assert (policy or "").startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


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
        (fmt.scientific(4.51e-7), f"4.5 {fmt.TIMES} 10⁻⁷"),
        (fmt.scientific(0.79), f"7.9 {fmt.TIMES} 10⁻¹"),
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


# --- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: the report was not opened in a browser"
)


def browse(path: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """The DOM as Chromium builds it, the console's messages, and the URLs that were requested besides the page."""
    log = folder / "net.json"
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={folder}/profile",
    ]
    command += ["--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, _requests(log)


def _requests(log: Path) -> list[str]:
    """URLs in Chromium's network log, without those that Chromium asks for by itself."""
    found = re.findall(r'"url":"((?:https?|ftp|ws|wss):[^"]*)"', log.read_text())
    own = re.compile(r"https?://([\w.-]*\.)?(google|googleapis|gstatic|gvt1)\.com")
    return [url for url in found if not own.match(url)]


@needs_chromium
def test_browser_renders_the_report_without_errors_or_requests(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(), encoding="utf-8")
    dom, console, requests = browse(path, tmp_path)
    assert console == []
    assert requests == []
    for text in (
        "Times of 16 ranks on 2 cores say nothing about GPUs",
        "n4m4:batch / tp8pp2",
        "rank 15: heads 24 to 31",
    ):
        assert text in dom
    assert dom.count("<svg") == 12 and dom.rstrip().endswith("</html>")


@needs_chromium
def test_browser_runs_nothing_from_hostile_names(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(hostile_page(), encoding="utf-8")
    dom, console, requests = browse(path, tmp_path)
    assert (console, requests) == ([], [])
    assert "<script" not in dom and "<img" not in dom
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom


@needs_chromium
def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    """The same check sees a script that the policy stops, and without a policy a request."""
    path = tmp_path / "bad.html"
    path.write_text(page().replace("</main>", "<script>alert(1)</script></main>"), encoding="utf-8")
    assert any("Content Security Policy" in line for line in browse(path, tmp_path)[1])
    path.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/pixel.png'>", encoding="utf-8")
    assert browse(path, tmp_path)[2]
