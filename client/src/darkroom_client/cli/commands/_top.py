"""``darkroom top``: what a server does, live."""

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from darkroom_client._client import Client
from darkroom_client._errors import Unavailable
from darkroom_client._types.status import EngineStatus, ServerStatus
from darkroom_client.cli._connect import connect
from darkroom_client.cli._flags import message
from darkroom_client.cli.terminal._console import open_console, readable_bytes, readable_seconds

if TYPE_CHECKING:
    import rich.console
    import rich.text

_BAR_WIDTH = 32
_FULL, _EMPTY = "█", "░"
_RATE_SECONDS = 10.0
"""The rate is that of at least so long a time."""


def run(arguments: argparse.Namespace) -> int:
    """Show the status until an interrupt."""
    if arguments.interval <= 0:
        raise ValueError(f"--interval is {arguments.interval:g}, must be above 0")
    console = open_console()
    if not console.is_terminal:
        raise ValueError("top needs a terminal; status prints the same once")
    from rich.live import Live

    with connect(arguments) as client, Live(console=console, auto_refresh=False) as live:
        seen = _Rate()
        try:
            while True:
                live.update(_look(client, seen), refresh=True)
                time.sleep(arguments.interval)
        except KeyboardInterrupt:
            return 0


class _Rate:
    """Jobs that finish in a second, over the last seconds."""

    def __init__(self) -> None:
        self._counts: list[tuple[float, int]] = []

    def update(self, status: ServerStatus) -> float | None:
        """Add a look; None until there are two of one server's life."""
        now, finished = time.monotonic(), status.ended_jobs.get("finished", 0)
        if self._counts and finished < self._counts[-1][1]:
            self._counts.clear()  # The server restarted.
        self._counts.append((now, finished))
        while len(self._counts) > 2 and now - self._counts[1][0] >= _RATE_SECONDS:
            del self._counts[0]
        then, before = self._counts[0]
        return (finished - before) / (now - then) if now > then else None


def _look(client: Client, seen: _Rate) -> "rich.console.RenderableType":
    from rich.console import Group

    try:
        status = client.status()
    except Unavailable as error:
        return f"{client.target}  {message(error)}"
    return Group(*_lines(client.target, status, seen.update(status)))


def _lines(target: str, status: ServerStatus, rate: float | None) -> "Iterator[rich.text.Text]":
    from rich.text import Text

    up = readable_seconds(status.uptime)
    yield Text.assemble((target, "bold"), f"  {status.state}, up {up}, version {status.version}")
    yield _line("queue", status.queued_jobs, status.max_queued_jobs, "jobs")
    most = max((model.max_rows for model in status.models), default=0)
    for engine in status.engines:
        yield _line(f"batch {engine.index}", engine.rows_in_use, most, "rows", _engine(engine))
        used, total = (engine.memory_bytes.get(f"device_{kind}", 0) for kind in ("used", "total"))
        if total:
            own = engine.memory_bytes.get("allocated", 0)
            note = f"{readable_bytes(own)} by this engine" if own else ""
            yield _line(f"memory {engine.index}", used, total, "", note)
    ended = ", ".join(f"{count} {how}" for how, count in status.ended_jobs.items() if count)
    speed = "" if rate is None else f"  {rate:.2f} finished per second"
    yield Text(f"{'jobs':<10}{status.running_jobs} running; {ended or 'none ended'}{speed}")
    for model in status.models:
        counts = f"{model.state}, {model.queued_jobs} queued, {model.running_jobs} running"
        yield Text(f"{model.id:<9} {counts}")


def _engine(engine: EngineStatus) -> str:
    state = "" if engine.ready else "not ready, "
    restarts = f", {engine.restarts} restarts" if engine.restarts else ""
    return f"{state}{engine.samples} images, {engine.device}{restarts}"


def _line(name: str, value: int, most: int, unit: str, note: str = "") -> "rich.text.Text":
    from rich.text import Text

    filled = min(_BAR_WIDTH, round(_BAR_WIDTH * value / most)) if most else 0
    colour = "red" if most and value >= most else "green"
    counts = f"{value} of {most} {unit}"
    if not unit:
        counts = f"{readable_bytes(value)} of {readable_bytes(most)}"
    return Text.assemble(
        f"{name:<9} ",
        (_FULL * filled, colour),
        (_EMPTY * (_BAR_WIDTH - filled), "dim"),
        f" {counts}" + (f"  {note}" if note else ""),
    )
