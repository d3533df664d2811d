"""The command line: parses to specifications and layouts, calls, prints. No logic of its own."""

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from headgrid import __version__
from headgrid.cli import calibrate, check, lab, models, scale
from headgrid.errors import HeadgridError
from headgrid.runtime import launch

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
)
_INTERRUPTED = 130
_COMMANDS = (
    lab.compare,
    scale.scale,
    calibrate.calibrate,
    models.generate,
    models.verify,
    lab.layouts,
    lab.report,
    check.check,
    lab.env,
)
for _command in _COMMANDS:
    app.command()(_command)


def main() -> None:
    """Entry point: expected failures become one block on standard error and an exit code of their own."""
    signal.signal(signal.SIGTERM, _interrupt)  # a polite end is like Ctrl-C: ranks are ended, nothing is left behind
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except HeadgridError as error:
        show(error)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        if not launch.joined_by_torchrun() or launch.place().local_rank == 0:
            Console(stderr=True).print(
                "interrupted: nothing is left running; a comparison goes on with --resume", style="yellow"
            )
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if not _is_usage(error):
            raise
        if said := error.format_message():  # type: ignore[attr-defined]  # nothing where help has been shown
            Console(stderr=True, highlight=False).print(f"error: {escape(said)}", style="red")
        sys.exit(64)


def show(error: HeadgridError) -> None:
    """Print it; of ranks that a launcher started, one on each host does."""
    shown, told = launch.settle(error) if launch.joined_by_torchrun() else (error, lambda: None)
    if shown is not None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(escape(shown.block()), style="red")
        told()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _is_usage(error: Exception) -> bool:
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Exact attention on any number of GPUs: heads in n groups, channels of every head in m slices."""
    if version:
        Console().print(f"headgrid {__version__}", highlight=False)
        raise typer.Exit
