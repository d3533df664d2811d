"""Does a report page show what its journal gives? Its words and figures against those of a page made again."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path

from headgrid.errors import HeadgridError
from headgrid.experiment.check.finding import Finding, Note
from headgrid.report.conclude import documents
from headgrid.report.html import render

_WORD = re.compile(r"\S+")
_BEFORE, _AFTER = 4, 8
"""Words that a finding quotes around the first difference."""
_MAKER = "headgrid "


class _Page(HTMLParser):
    """What a reader sees outside drawings, whose text depends on the version of the plotting library.

    `words`: in their order. `maker`: the hash of the source that made the page, where it says so.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.maker: str | None = None
        self._hidden = 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A drawing or a style begins, or the page says what made it."""
        self._hidden += tag in ("svg", "style")
        if tag == "meta" and dict(attrs).get("name") == "generator":
            self.maker = (dict(attrs).get("content") or "").removeprefix(_MAKER)

    def handle_endtag(self, tag: str) -> None:
        """It ends."""
        self._hidden -= tag in ("svg", "style")

    def handle_data(self, data: str) -> None:
        """Text, and data that is embedded for scripts."""
        if not self._hidden:
            self.words += _WORD.findall(data)


def page_figures(folder: Path, source_sha256: str) -> Iterator[Finding | Note]:
    """report.html against a page that is made again here.

    It is compared if this version made the run or says that it made the page: an edited page of a run of this version
    cannot escape by naming another maker. That of another version's run can, hence the note.
    """
    path = folder / "report.html"
    if not path.exists():
        return
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    shown = _Page(path.read_text(encoding="utf-8"))
    if source_sha256 not in (env.get("source_sha256"), shown.maker):
        what = "report.html was not compared: neither it nor the run is of this version"
        yield Note(f"{what}; `headgrid report {folder}` makes the page again from the journal")
        return
    try:
        stored = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        made = _Page(render(*documents(folder, stored.get("run"))))
    except (HeadgridError, OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        yield Finding("report.figures", "report.html", f"it cannot be made again: {error!r:.200}")
        return
    if shown.words != made.words:
        yield Finding("report.figures", "report.html", _difference(shown.words, made.words))


def _difference(shown: list[str], made: list[str]) -> str:
    """The first one, with the words around it."""
    place = next(index for index, (one, other) in enumerate(zip_longest(shown, made)) if one != other)
    around = slice(max(0, place - _BEFORE), place + _AFTER)
    theirs, ours = (" ".join(words[around]) for words in (shown, made))
    return f"shows '{theirs:.160}' where the journal gives '{ours:.160}'"
