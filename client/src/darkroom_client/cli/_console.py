"""What a command prints: coloured on a terminal, plain and never wrapped in a pipe."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.progress


def open_console(*, stderr: bool = False) -> "rich.console.Console":
    """A console on stdout or stderr; texts are printed as they are, never read as markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_line(console: "rich.console.Console", first: str, rest: str, style: str) -> None:
    """Print one line whose beginning is styled, in one go: a live bar redraws after each."""
    from rich.text import Text

    console.print(Text.assemble((first, style), rest))


def progress_bar(console: "rich.console.Console", *, shown: bool) -> "rich.progress.Progress":
    """A bar with done/total and the time left; silent where ``console`` is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (shown and console.is_terminal),
    )
