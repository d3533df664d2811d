"""The command that checks results: a run folder, or anyone's figures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headgrid.cli.show import Json, console_for
from headgrid.errors import CheckFailed

if TYPE_CHECKING:
    from headgrid.experiment.check.finding import Finding, Note, Verdict


def check(
    subject: Annotated[Path, typer.Argument(help="A run folder, or a FILE.json or FILE.csv of results.")],
    published: Annotated[
        str | None, typer.Option(help="The journal's last link (or its beginning) as it was published before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a run or anyone's results: make every figure again, and let physics, arithmetic and redundancy object.

    A run folder: hashes, the journal's chain, the declared order, every figure of summary.json and report.html, clocks,
    verdicts, predicted bytes. A file (docs/check.md describes it): rooflines, Little's law, memory, communication,
    intervals, effect sizes. Ends with exit code 65 and the reasons by name if anything contradicts.

    Examples:

        headgrid check runs/20261122-130000-compare-seed

        headgrid check their-results.json --json

        headgrid check runs/20261122-130000-compare-seed --published 3f9a0c77d2
    """
    from headgrid.experiment.check.check import check_file, check_run, is_run

    console = console_for(as_json)
    if is_run(subject):
        from headgrid.experiment.machine import source_sha256

        source = source_sha256()
        verdict = check_run(subject, source_sha256=source, published=published, also=_page(subject, source))
    else:
        verdict = check_file(subject)
    _print(console, verdict)
    if as_json:
        sys.stdout.write(json.dumps(verdict.to_dict(), allow_nan=False) + "\n")
    if not verdict.accepted:
        raise CheckFailed(
            f"{subject} is rejected for {len(verdict.reasons)} reason{'s' * (len(verdict.reasons) > 1)}",
            why=", ".join(verdict.reasons),
        )


def _page(folder: Path, source: str) -> "Iterator[Finding | Note]":
    from headgrid.report.audit import page_figures

    yield from page_figures(folder, source)


def _print(console: Console, verdict: "Verdict") -> None:
    for finding in verdict.findings:
        console.print(f"[red]{finding.gate}[/red]  {escape(finding.where)}: {escape(finding.what)}", soft_wrap=True)
    for note in verdict.notes:
        console.print(f"- {escape(note)}", style="yellow", soft_wrap=True)
    counted = ", ".join(f"{count} {name}" for name, count in verdict.examined.items())
    console.print(f"{len(verdict.gates)} gates, {counted}", style="dim")
    if verdict.accepted:
        console.print(f"{escape(verdict.subject)}: nothing contradicts it", style="green", soft_wrap=True)
