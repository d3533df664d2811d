"""The report in a real browser: what its script does, that nothing else runs, and that it is whole without it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import PATH, Chromium, Page
from PIL import Image
from report_fixture import HOSTILE, hostile_page, is_drawn, page, read
from run_fixture import ARMS, make_design, make_records

from headgrid.experiment.multiplicity import claimed
from headgrid.experiment.records import block_times
from headgrid.experiment.stats import summarise
from headgrid.report import format as fmt
from headgrid.report.conclude import Documents, documents
from headgrid.report.html import render

pytestmark = pytest.mark.skipif(PATH is None, reason="no chromium on PATH: the report was not opened in a browser")

DESIGN = make_design()
RECORDS = make_records(DESIGN)
for slow in (record for record in RECORDS if record["kind"] == "block" and record["arm"] == "tp16"):
    slow["prefill_s"] = [3.5 * seconds for seconds in slow["prefill_s"]]  # below 1,000 tok/s: "9" comes after "1"
SUMMARY = summarise(DESIGN, RECORDS)
LABELS = [arm["label"] for arm in ARMS]
KEPT = Path(__file__).parents[2] / "benchmarks" / "2026-11-23-seed-2xh200"
WIDTH, HEIGHT = 390, 844
"""Of a phone."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    started = Chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(DESIGN, RECORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kept_run() -> Documents:
    """A kept run: nine arms on two GPUs, with telemetry."""
    return documents(KEPT, None)


@pytest.fixture(scope="module")
def kept(kept_run: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page."""
    path = tmp_path_factory.mktemp("kept") / "report.html"
    path.write_text(render(*kept_run), encoding="utf-8")
    return path


@pytest.fixture
def tab(browser: Chromium, report: Path) -> Iterator[Page]:
    with browser.open(report) as opened:
        yield opened
        assert (opened.complaints, opened.requests, opened.dialogs) == ([], [], 0)


def table(title: str) -> str:
    """The selector of a table."""
    return f'.scroll[aria-label="{title}"] > table'


def column(tab: Page, title: str, index: int) -> list[str]:
    """The texts of a column that are shown, of the first row of each group."""
    rows = f"[...document.querySelector({json.dumps(table(title))}).tBodies].filter(body => body.offsetHeight)"
    return tab.evaluate(f"{rows}.map(body => body.rows[0].cells[{index}].textContent)")


def click_arm(tab: Page, label: str) -> None:
    if not tab.evaluate('document.querySelector("#tools details").open'):
        tab.click("#tools summary")
    tab.click(f'#arms input[value="{LABELS.index(label)}"]')


# --- nothing but the page --------------------------------------------------------------------------------------------


def test_the_kept_runs_page_is_small_fits_a_phone_and_asks_for_nothing(browser: Chromium, kept: Path) -> None:
    assert 300_000 < kept.stat().st_size < 1_000_000
    with browser.open(kept, width=WIDTH, height=HEIGHT) as tab:
        assert (
            tab.evaluate('document.querySelectorAll("details").forEach(each => (each.open = true)); innerWidth')
            == WIDTH
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= WIDTH
        assert tab.evaluate('document.querySelectorAll("#arms input").length') == 9
        assert tab.evaluate('document.querySelectorAll("[data-point]").length') == 2 * 9 * 4  # one warm-up, three timed
        assert (tab.complaints, tab.requests) == ([], [])


def test_a_page_that_does_not_fit_or_asks_is_seen(browser: Chromium, report: Path, tmp_path: Path) -> None:
    """The negative control of the checks above, and of those that every tab ends with."""
    source = report.read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    bad.write_text(source.replace("</main>", "<script>alert(1)</script></main>"), encoding="utf-8")
    with browser.open(bad) as tab:
        assert any("Content Security Policy" in text for text in tab.complaints) and tab.dialogs == 0
    open_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    wide = "<img src='http://127.0.0.1:9/pixel.png'><p style='width: 60rem'>x</p></main>"
    bad.write_text(open_policy.replace("</main>", wide), encoding="utf-8")
    with browser.open(bad, width=WIDTH, height=HEIGHT) as tab:
        assert tab.requests == ["http://127.0.0.1:9/pixel.png"]
        assert tab.evaluate("document.documentElement.scrollWidth") > WIDTH


def test_an_edited_script_does_not_run(browser: Chromium, report: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited.html"
    edited.write_text(report.read_text(encoding="utf-8").replace('"use strict";', '"use strict"; '), encoding="utf-8")
    with browser.open(edited) as tab:
        assert any("Content Security Policy" in text for text in tab.complaints)
        assert tab.evaluate('document.getElementById("tools").hidden')


def hostile(path: Path, source: str) -> Path:
    path.write_text(source, encoding="utf-8")
    return path


def use_everything(tab: Page) -> None:
    """Every button but those that save, every choice, and a walk through every drawing."""
    tab.evaluate("""
        document.querySelectorAll("details").forEach(each => (each.open = true));
        document.querySelectorAll("thead button, #pair-swap").forEach(each => each.click());
        document.querySelectorAll("#arms input").forEach(each => each.click());
        document.querySelectorAll("#arms input").forEach(each => each.click());
        for (const select of document.querySelectorAll("select"))
            for (const option of select.options) {
                select.value = option.value;
                select.dispatchEvent(new Event("change"));
            }
        for (const drawing of document.querySelectorAll(".drawing"))
            for (let n = 0; n < 20; n += 1) drawing.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
    """)


def test_hostile_names_are_inert_whatever_is_clicked(browser: Chromium, tmp_path: Path) -> None:
    with browser.open(hostile(tmp_path / "report.html", hostile_page())) as tab:
        use_everything(tab)
        assert (
            tab.evaluate('document.querySelectorAll("img, script:not(#data), svg[onload]").length') == 1
        )  # our script
        assert "<script>alert(1)</script>" in tab.evaluate('document.getElementById("arms").textContent')
        assert tab.evaluate("document.title").count("alert(1)") == 2
        saved = tab.saved("#save-blocks")
        assert re.fullmatch(r"headgrid-[a-z0-9-]+\.csv", saved.name)
        assert (tab.complaints, tab.requests, tab.dialogs) == ([], [], 0)


@pytest.mark.parametrize("policy", [True, False])
def test_a_page_that_does_not_escape_is_caught(browser: Chromium, tmp_path: Path, policy: bool) -> None:
    """The same checks, one name written as it is: with the policy there is a complaint, without it an alert."""
    source = page().replace("<h1>", f"<h1>{HOSTILE}".encode("utf-8", "replace").decode(), 1)
    if not policy:
        source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    path = hostile(tmp_path / "report.html", source)
    with browser.open(path) as tab:
        assert tab.complaints if policy else tab.dialogs


def test_cells_that_begin_like_a_formula_are_guarded(browser: Chromium, tmp_path: Path) -> None:
    arms = [{**ARMS[0], "label": '=HYPERLINK("http://x")'}, {**ARMS[2], "label": "@SUM(A1)"}]
    path = hostile(tmp_path / "report.html", page(make_design(arms=arms, launches=1, blocks=2)))
    with browser.open(path) as tab:
        rows = read(tab.saved("#save-blocks"))
    assert {row[0] for row in rows[1:]} == {'\'=HYPERLINK("http://x")', "'@SUM(A1)"}


def test_without_script_the_page_is_whole(browser: Chromium, report: Path) -> None:
    with browser.open(report, script=False) as tab:
        shown = tab.evaluate("document.body.innerText")
        assert tab.evaluate('document.getElementById("tools").hidden && document.getElementById("pair").hidden')
        assert tab.evaluate('document.querySelectorAll("svg title").length') > 20, "a browser shows them"
        assert (tab.complaints, tab.requests) == ([], [])
    for text in ("Performance metrics", "n4m4:batch / tp8pp2", "Prefill blocks as they ran", "Environment", "lab-1"):
        assert text in shown
    assert "Any two arms" not in shown and "Hidden by the reader" not in shown


# --- sorting ---------------------------------------------------------------------------------------------------------


def test_numbers_are_sorted_as_numbers_and_back(tab: Page) -> None:
    title, head = "Performance metrics", f"{table('Performance metrics')} thead th:nth-child(2)"
    means = {arm["label"]: arm["prefill_tokens_per_s"]["mean"] for arm in SUMMARY["arms"]}
    rising = sorted(LABELS, key=lambda label: means[label])
    texts = [f"{means[label]:,.0f}" for label in rising]
    assert texts != sorted(texts) and rising not in (LABELS, LABELS[::-1]), "else this test could not fail"
    for expected, said in ((rising, "ascending"), (rising[::-1], "descending"), (LABELS, None)):
        tab.click(f"{head} button")
        assert column(tab, title, 0) == expected
        assert tab.evaluate(f"document.querySelector({json.dumps(head)}).getAttribute('aria-sort')") == said


def test_sizes_in_several_units_and_powers_of_ten_are_sorted_by_what_they_are(
    browser: Chromium, kept: Path, kept_run: Documents
) -> None:
    sizes = [arm["memory_bytes"]["communication_buffer"] for arm in kept_run.summary["arms"] if arm["role"] != "aa"]
    with browser.open(kept) as tab:
        tab.click(f"{table('Memory per rank, GiB')} thead th:nth-of-type(5) button")
        shown = [text.strip() for text in column(tab, "Memory per rank, GiB", 5)]
        assert shown[:3] == ["0", "512 B", "512 B"] and len(shown) == len(sizes) and "0.2289" == shown[-1]
        tab.click(f"{table('Accuracy')} thead th:nth-child(8) button")
        powers = [re.sub(rf"\s*{fmt.TIMES}\s*10", "e", text) for text in column(tab, "Accuracy", 7)]
        errors = [float(text.translate(POWERS)) for text in powers]
        assert errors == sorted(errors) and len({*errors}) > 1


POWERS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def test_the_keyboard_sorts(tab: Page) -> None:
    head = f"{table('Performance metrics')} thead th:nth-child(1)"
    tab.evaluate(f"document.querySelector({json.dumps(head + ' button')}).focus()")
    tab.press("Enter")
    natural = ["n4m4:batch", "n4m4:gather+concat", "tp8pp2", "tp8pp2 (A/A)", "tp16"]
    assert column(tab, "Performance metrics", 0) == natural != sorted(natural)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_a_hidden_arm_is_nowhere_and_the_page_says_so(browser: Chromium, tab: Page, report: Path) -> None:
    before = tab.evaluate('document.querySelector("svg[data-pitch]").getAttribute("viewBox")').split()
    click_arm(tab, "tp16")
    assert column(tab, "Performance metrics", 0) == [label for label in LABELS if label != "tp16"]
    assert not [text for text in column(tab, "Statistical analysis: decode", 0) if "tp16" in text]
    assert "Hidden by the reader: tp16." in tab.evaluate("document.body.innerText")
    shown = '[...document.querySelectorAll("svg [data-arms]")].filter(each => each.getBoundingClientRect().width)'
    assert tab.evaluate(f'{shown}.filter(each => each.dataset.arms.split(" ").includes("4")).length') == 0
    assert tab.evaluate(f'{shown}.filter(each => each.dataset.arms.split(" ").includes("0")).length') > 20
    after = tab.evaluate('document.querySelector("svg[data-pitch]").getAttribute("viewBox")').split()
    assert float(after[3]) < float(before[3]) and float(after[1]) + float(after[3]) == pytest.approx(float(before[3]))
    fragment = tab.evaluate("location.hash")
    assert "hide=4" in fragment
    with browser.open(report, fragment=fragment) as again:
        assert column(again, "Performance metrics", 0) == [label for label in LABELS if label != "tp16"]
        click_arm(again, "tp16")
        assert column(again, "Performance metrics", 0) == LABELS


@pytest.mark.parametrize("fragment", ["#hide=99,x,-1&theme=<b>&a=7&b=1e9", "#raw", "#%E0%A4%A", "#hide=&a=&b="])
def test_no_address_breaks_the_page(browser: Chromium, report: Path, fragment: str) -> None:
    with browser.open(report, fragment=fragment) as tab:
        assert column(tab, "Performance metrics", 0) == LABELS
        assert tab.complaints == []


# --- any two arms ----------------------------------------------------------------------------------------------------


def select(tab: Page, name: str, value: object) -> None:
    """Choose an option, as a reader does."""
    change = f"s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change'))"
    tab.evaluate(f"(s => {{ {change} }})(document.getElementById('{name}'))")


def pair(tab: Page, a: str, b: str) -> dict[str, list[str]]:
    """What the chooser shows for two arms, by phase."""
    select(tab, "pair-a", LABELS.index(a))
    select(tab, "pair-b", LABELS.index(b))
    rows = tab.evaluate('[...document.getElementById("pair-rows").rows].map(r => [...r.cells].map(c => c.textContent))')
    return {row[0]: row[1:] for row in rows}


def test_the_pair_chooser_shows_the_summarys_numbers(tab: Page) -> None:
    for row in SUMMARY["comparisons"]:
        found = pair(tab, row["a"], row["b"])[row["phase"]]
        ratio, ci95 = fmt.ratio(row["ratio"], row["ci95"])
        how = "exploratory" if row.get("family") == "exploratory" else "declared"
        assert found == [ratio, ci95, claimed(row), f"{row['n']} ({row['unit']})", how]
    assert pair(tab, "tp16", "tp8pp2 (A/A)")["prefill"][-1] == "exploratory"


def test_swapped_arms_swap_the_verdict(tab: Page) -> None:
    assert pair(tab, "n4m4:batch", "tp8pp2")["prefill"][2] == "faster"
    tab.click("#pair-swap")
    shown = tab.evaluate('document.getElementById("pair-rows").rows[0].cells[3].textContent')
    assert shown == "slower"
    assert tab.evaluate("location.hash") == "#a=0&b=2"


# --- export ----------------------------------------------------------------------------------------------------------


def test_csv_of_a_table_parses_back_to_its_figures(tab: Page) -> None:
    rows = read(tab.saved(act("Performance metrics")))
    assert [row[0] for row in rows] == ["Method", *LABELS] and {len(row) for row in rows} == {10}
    column = fmt.figures([arm["prefill_tokens_per_s"] for arm in SUMMARY["arms"]])
    assert [row[1] for row in rows[1:]] == [mean.replace(",", "") for mean, _, _ in column]
    assert min(float(row[1]) for row in rows[1:]) < 1000 < max(float(row[1]) for row in rows[1:])


def act(title: str) -> str:
    """The selector of the button that saves a table."""
    return f'h3:has(+ .act + .scroll[aria-label="{title}"]) + .act'


def test_csv_of_a_table_with_spans_has_every_cell_in_every_row(tab: Page) -> None:
    click_arm(tab, "tp16")
    tab.evaluate('document.querySelector("#tools details").open = false')
    rows = read(tab.saved(act("Accuracy")))
    assert [row[0] for row in rows[1:]] == [label for label in LABELS[:4] for _ in range(2)], (
        "what is hidden is left out"
    )
    assert [row[2] for row in rows[1:]] == ["prefill", "decode"] * 4
    errors = [arm["verify"]["phases"]["prefill"]["relative_error"] for arm in SUMMARY["arms"][:4]]
    assert [float(row[3]) for row in rows[1::2]] == pytest.approx(errors, rel=0.05)


def test_csv_of_the_blocks_has_the_journals_seconds(tab: Page) -> None:
    rows = read(tab.saved("#save-blocks"))
    named = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for label in LABELS:
        mine = {
            (int(r["launch"]), int(r["block"])): float(r["decode_s"])
            for r in named
            if r["arm"] == label and r["warm_up"] == "0"
        }
        assert mine == block_times(RECORDS, label, "decode")


@pytest.mark.parametrize(
    ("title", "colour"), [("Prefill throughput", (31, 95, 168)), ("Decode blocks as they ran", (31, 95, 168))]
)
def test_png_of_a_drawing_is_drawn(tab: Page, tmp_path: Path, title: str, colour: tuple[int, int, int]) -> None:
    number = tab.evaluate(
        '[...document.querySelectorAll("figure")].findIndex('
        f'f => f.querySelector("h3").firstChild.textContent === {json.dumps(title)})'
    )
    tab.evaluate(f'document.querySelectorAll("figure")[{number}].id = "chosen"')
    path = tab.saved("#chosen .act")
    assert path.name == f"headgrid-compare-{title.lower().replace(' ', '-')}.png"
    assert is_drawn(path)
    with Image.open(path) as image:
        paper = image.convert("RGB").getpixel((1, 1))
        assert paper == (253, 253, 251)
    Image.new("RGB", (1000, 500), (253, 253, 251)).save(tmp_path / "blank.png")
    assert not is_drawn(tmp_path / "blank.png"), "the check can fail"


# --- read-outs, theme, print -----------------------------------------------------------------------------------------


def test_pointing_at_a_block_tells_what_it_was(tab: Page) -> None:
    rows = tab.evaluate('JSON.parse(document.getElementById("data").textContent).blocks')
    number = next(n for n, row in enumerate(rows) if row[:3] == [2, 3, 4] and not row[4])
    tab.move(*tab.place(f'[data-point="{number}"]'))
    told = tab.evaluate(
        f'document.querySelector(\'[data-point="{number}"]\').closest("figure").querySelector(".readout").textContent'
    )
    assert told.startswith("n4m4:batch, launch 3, block 4: prefill ")
    assert [float(x) for x in re.findall(r"([\d.]+) s\b", told)] == pytest.approx(rows[number][5:7], rel=1e-5)


def test_arrow_keys_walk_through_a_drawing(tab: Page) -> None:
    tab.evaluate('document.querySelector("figure .drawing").focus()')
    readout = 'document.querySelector("figure .readout").textContent'
    found = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Escape"):
        tab.press(key)
        found.append(tab.evaluate(readout))
    assert found[0].startswith("tp8pp2: ") and "tokens per second" in found[0]
    assert found[2] == found[0] and found[3] == ""


def background(tab: Page) -> tuple[int, ...]:
    text = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_themes(browser: Chromium, tab: Page, report: Path) -> None:
    light, dark = (253, 253, 251), (22, 24, 27)
    assert background(tab) == light
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert background(tab) == dark
    for chosen, expected in (("light", light), ("dark", dark), ("auto", dark)):
        select(tab, "theme", chosen)
        assert background(tab) == expected
    with browser.open(report, fragment="#theme=dark") as again:
        assert background(again) == dark
        again.send("Emulation.setEmulatedMedia", media="print")
        assert again.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert again.evaluate('document.getElementById("tools").offsetHeight') == 0


def test_it_prints(tab: Page, tmp_path: Path) -> None:
    printed = tab.pdf(tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF-") and 3 < printed.count(b"/Type /Page\n") < 40
