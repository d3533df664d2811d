"""What all commands print with."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]
Out = Annotated[Path, typer.Option(help="Folder for run folders.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]


def console_for(as_json: bool) -> Console:
    """Standard output belongs to JSON when there is JSON; a pipe gets lines wide enough for the tables."""
    console = Console(stderr=as_json, highlight=False)
    return console if console.is_terminal else Console(stderr=as_json, highlight=False, width=120)


@contextmanager
def progress_bar(console: Console) -> Any:
    """A bar, and the function that moves it."""
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting ranks", total=None)

        def show(progress: Any) -> None:
            bar.update(task, completed=progress.done, total=progress.total, description=escape(progress.latest))

        yield show


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is words and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", no_wrap=n == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
