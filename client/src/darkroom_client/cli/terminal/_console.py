"""The output of a command: coloured on a terminal, plain and unwrapped in a pipe."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.progress

Row = Sequence[str]


def open_console(*, stderr: bool = False) -> "rich.console.Console":
    """A console on stdout or stderr; it prints text as it is, without markup."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            """Let the command end with its own exit code; rich would exit with 1."""
            raise BrokenPipeError

    return PlainConsole(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_line(console: "rich.console.Console", first: str, rest: str, style: str) -> None:
    """Print a line with a styled start, in one call: a live bar updates after each call."""
    from rich.text import Text

    console.print(Text.assemble((first, style), rest))


def progress_bar(console: "rich.console.Console") -> "rich.progress.Progress":
    """Bars with done/total, a note and the remaining time; tasks have the fields note and unit."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        # A prompt is not markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[unit]}", style="dim"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="cyan"),
        TimeRemainingColumn(compact=True),
        console=console,
        auto_refresh=False,
    )


def tabulate(
    console: "rich.console.Console", names: Sequence[str], rows: Iterable[Row], *, whole: int = 0
) -> None:
    """Print rows: a table on a terminal, tab-separated lines in a pipe.

    On a narrow terminal the first ``whole`` columns keep their width.
    """
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    from rich.table import Column, Table

    # Folded, not cut off: people type these names.
    columns = (
        Column(name, overflow="fold", no_wrap=index < whole) for index, name in enumerate(names)
    )
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)


def readable_bytes(count: int) -> str:
    """A number of bytes in MiB, or in GiB from 1 GiB on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def readable_seconds(seconds: float) -> str:
    """A duration as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
