"""What a page carries for its script: the script itself, allowed by its hash, and the data as JSON that nobody runs."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from headgrid.experiment.design import analysis_of
from headgrid.experiment.records import Record
from headgrid.report.blocks import COLUMNS, Block, listed
from headgrid.report.naming import named
from headgrid.report.pairs import every_pair

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
"""JSON's own escapes: in its strings, the only place where these occur, they mean the same, and no tag can begin."""


def script() -> tuple[Markup, str]:
    """The page's script, and its hash as a Content-Security-Policy takes it."""
    source = resources.files("headgrid.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return Markup(source), f"sha256-{digest}"


def data(
    design: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record], blocks: Sequence[Block]
) -> Markup:
    """The JSON that the script reads: arms in the summary's order, all pairs, and the blocks unless they are many."""
    document = {
        "name": design["name"],
        "arms": [{"label": arm["label"], "called": named(arm)} for arm in summary["arms"]],
        "pairs": every_pair(summary, records, design["margin"], analysis_of(design)),
        "columns": COLUMNS,
        "blocks": [block.row for block in blocks] if listed(blocks) else [],
    }
    return Markup(json.dumps(document, allow_nan=False, ensure_ascii=False).translate(_ESCAPES))
