"""The live display of ``generate``: a bar for each image, and the unfinished images."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from darkroom_client._types.events import (
    Accepted,
    Event,
    ImageReady,
    Preview,
    Progress,
    Queued,
    Reconnecting,
    Restarted,
    Started,
)
from darkroom_client._types.image import Image
from darkroom_client.cli.terminal._console import print_line, progress_bar
from darkroom_client.cli.terminal._halfblocks import check_pillow, half_blocks, side_by_side
from darkroom_client.cli.terminal._picture import leave_picture

if TYPE_CHECKING:
    import rich.console
    import rich.live
    import rich.progress
    import rich.text

WAIT_WORDS = {
    "QUEUE_FULL": "the server's queue is full",
    "QUOTA_EXCEEDED": "the quota is used up",
    "DEADLINE_UNREACHABLE": "the queue is longer than the timeout",
    "MODEL_LOADING": "the model is loading",
    "DRAINING": "the server is shutting down",
    "UNAVAILABLE": "no server answers",
}
"""What a command waits for, by the reason of the error."""

_PROMPT_WIDTH = 30
_PICTURE_WIDTH = 32


class Display:
    """The live part of the screen on a terminal, the lines above it, and what remains at the end.

    ``shown``: there are lines at all. ``picture``: the last image remains on a terminal.
    """

    def __init__(
        self,
        console: "rich.console.Console",
        *,
        images: int,
        shown: bool,
        preview: bool,
        picture: bool,
    ) -> None:
        if preview and not (shown and console.is_terminal):
            raise ValueError("--preview needs a terminal: no pipe, and no --json")
        if preview:
            check_pillow()
        self._console = console
        # Whether there is a live part.
        self.shown = shown and console.is_terminal
        self._bars = progress_bar(console)
        self._all = self._bars.add_task("all", total=images, visible=images > 1, note="", unit="")
        self._picture = picture
        self._began_at = time.monotonic()
        self._counted = 0
        self._last: Image | None = None
        self._many = images > 1
        self._wait = ""
        self._pictures: dict[int, rich.text.Text] = {}
        self._live: rich.live.Live | None = None

    def print(self, first: str, rest: str) -> None:
        """Print a permanent line above the live part."""
        print_line(self._console, first, rest, "bold")

    def count(self, image: Image) -> None:
        """Count a saved image; the last one stays on the screen."""
        self._counted += 1
        self._last = image

    @contextmanager
    def follow(self, prompt: str, images: int) -> "Iterator[PromptBars]":
        """Show bars for the images of ``prompt`` until the end of the block."""
        bars = PromptBars(self, prompt, images)
        try:
            yield bars
        finally:
            bars.remove()

    def advance(self, images: int) -> None:
        """Count ``images`` whose prompt has ended."""
        self._bars.advance(self._all, images)

    def show_wait(self, reason: str, seconds: float | None = None) -> None:
        """Show what the command waits for: in a bar, or once on stderr without a terminal."""
        words = WAIT_WORDS.get(reason, reason.lower().replace("_", " "))
        if self.shown:
            at_most = "" if seconds is None else f", up to {seconds:.0f} s"
            self._bars.update(self._all, visible=True, note=f"waits: {words}{at_most}")
        elif self._wait != words:
            print(f"darkroom: waits: {words}", file=sys.stderr, flush=True)
        self._wait = words

    def end_wait(self) -> None:
        """The server has accepted a request again."""
        if self._wait:
            self._wait = ""
            self._bars.update(self._all, visible=self._many, note="")

    def render(self) -> "rich.console.RenderableType":
        """The live part of the screen."""
        from rich.console import Group

        if not self._pictures:
            return self._bars
        room = max(1, self._console.width // (_PICTURE_WIDTH + 2))
        pictures = [self._pictures[key] for key in sorted(self._pictures)][:room]
        return Group(side_by_side(pictures), self._bars)

    def __enter__(self) -> Self:
        from rich.live import Live

        if self.shown:
            self._live = Live(
                get_renderable=self.render,
                console=self._console,
                refresh_per_second=10,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if error is None and self.shown:
            self._close()

    def _close(self) -> None:
        """Leave the last picture and the closing line."""
        if self._last is None:
            return
        if self._picture:
            leave_picture(self._console, self._last)
        seconds = time.monotonic() - self._began_at
        images = "1 image" if self._counted == 1 else f"{self._counted} images"
        self._console.print(f"{images} in {seconds:.1f} s, {self._counted / seconds:.2f} images/s")


class PromptBars:
    """The bars of one prompt's images."""

    def __init__(self, display: Display, prompt: str, images: int) -> None:
        self._display = display
        self._bars = display._bars
        name = prompt if len(prompt) <= _PROMPT_WIDTH else f"{prompt[: _PROMPT_WIDTH - 1]}…"
        # The bars of the unfinished images, by their index.
        self._tasks = {
            index: self._bars.add_task(
                f"{name} #{index + 1}" if images > 1 else name, total=None, note="", unit="step"
            )
            for index in range(images)
        }
        self._began_at = 0.0

    def show(self, event: Event) -> None:
        """Show ``event``."""
        match event:
            case Accepted() | Queued():
                position = event.queue_position if isinstance(event, Accepted) else event.position
                self._display.end_wait()
                self._note(f"{position} before" if position else "")
            case Reconnecting(attempt=attempt, reason=reason):
                self._note(f"reconnecting ({attempt}): {WAIT_WORDS.get(reason, reason)}")
                if not self._display.shown:
                    self._display.show_wait(reason)
            case Started():
                self._began_at = time.monotonic()
                self._note("")
            case Restarted():
                for task in self._tasks.values():
                    self._bars.reset(task, total=None, note="again: the server restarted")
            case Progress(image_index=index, step=step, steps=steps):
                seconds = time.monotonic() - self._began_at
                speed = f"{step / seconds:.1f} it/s" if seconds > 0 else ""
                # A new server may generate an image again that has arrived.
                if index in self._tasks:
                    task = self._tasks[index]
                    self._bars.update(task, completed=step, total=steps, note=speed)
            case Preview(image_index=index, data=data) if index in self._tasks:
                picture = half_blocks(data, _PICTURE_WIDTH)
                self._display._pictures[self._tasks[index]] = picture
            case ImageReady(image_index=index):
                self._remove(index)

    def remove(self) -> None:
        """Remove the bars and pictures."""
        for index in list(self._tasks):
            self._remove(index)

    def _note(self, note: str) -> None:
        for task in self._tasks.values():
            self._bars.update(task, note=note)

    def _remove(self, index: int) -> None:
        task = self._tasks.pop(index)
        self._display._pictures.pop(task, None)
        self._bars.remove_task(task)
