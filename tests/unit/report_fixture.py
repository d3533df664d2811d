"""Report pages for tests: an honest one, one full of hostile names, and a reader of pages without a browser."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image
from run_fixture import ARMS, make_design, make_env, make_records

from headgrid.experiment.stats import summarise
from headgrid.report.html import render

HOSTILE = (
    "<script>alert(1)</script>\"'$\\frac{1}{0}$ & <img src=x onerror=alert(2)></title></script><!--"
    "\u202e\u2066\u2028\x1b[31m\x00\ud800 <svg onload=alert(3)> {{ 7 * 7 }} javascript:alert(4)"
)


def page(design: dict[str, Any] | None = None, records: list | None = None, **changes: Any) -> str:
    design = design or make_design()
    records = make_records(design, **changes) if records is None else records
    return render(design, make_env(), records, summarise(design, records))


class Reader(HTMLParser):
    """Tags with their attributes, visible text, and whether all elements are closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "wbr")

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
        if not {"style", "script"} & {*self.open}:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


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
        if record["kind"] == "launch":
            record["device_names"] = [HOSTILE] * design["ranks"]
    env = {**make_env(), HOSTILE: {HOSTILE: HOSTILE}, "gpus": [{"name": HOSTILE}]}
    return render(design, env, records, summarise(design, records))


def read(path: Path) -> list[list[str]]:
    """The rows of a CSV."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def is_drawn(path: Path) -> bool:
    """Whether a PNG shows something: several colours, each on a share of it that no speck has."""
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        colours: Any = image.convert("RGB").getcolors(maxcolors=1 << 24)
        return image.width > 800 and sum(count > 1e-4 * image.width * image.height for count, _ in colours) > 3
