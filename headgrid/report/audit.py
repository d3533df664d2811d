"""Does a report page show what its journal gives? Its words and figures against those of a page made again."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from headgrid.experiment.check.finding import Finding, Note
from headgrid.experiment.folder import open_run
from headgrid.experiment.summary import summary_of
from headgrid.experiment.telemetry import FILE, read
from headgrid.report.html import render

_WORD = re.compile(r"\S+")
_SHOWN = 8


class _Words(HTMLParser):
    """What a reader sees outside drawings, whose text depends on the version of the plotting library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A drawing or a style begins."""
        self._hidden += tag in ("svg", "style")

    def handle_endtag(self, tag: str) -> None:
        """It ends."""
        self._hidden -= tag in ("svg", "style")

    def handle_data(self, data: str) -> None:
        """Text, and data that is embedded for scripts."""
        if not self._hidden:
            self.found.update(_WORD.findall(data))


def words(page: str) -> Counter[str]:
    """The words and figures of a page, with their numbers."""
    parser = _Words()
    parser.feed(page)
    return parser.found


def page_figures(folder: Path, source_sha256: str) -> Iterator[Finding | Note]:
    """report.html against a page that is made again here. A page of another version is not compared."""
    path = folder / "report.html"
    if not path.exists():
        return
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    if env.get("source_sha256") != source_sha256:
        yield Note("report.html is of another version and was not compared; `headgrid report` makes it again")
        return
    try:
        _, records = open_run(folder)
        design = json.loads((folder / "design.json").read_text(encoding="utf-8"))
        stored = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        kept = {key: stored.get(key) for key in ("run", "journal")}
        summary = summary_of(design, records, read(folder / FILE)) | kept
        made = words(render(design, env, records, summary))
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        yield Finding("report.figures", "report.html", f"it cannot be made again: {error!r:.200}")
        return
    shown = words(path.read_text(encoding="utf-8"))
    if shown != made:
        ours, theirs = (" ".join(list(extra)[:_SHOWN]) or "nothing" for extra in (made - shown, shown - made))
        yield Finding("report.figures", "report.html", f"shows {theirs:.120} where the journal gives {ours:.120}")
