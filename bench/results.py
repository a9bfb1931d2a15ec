"""Results as JSON files in ``bench/results``: what the pages are written from."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.arrivals import Drawn, Outcome
from bench.machine import MachineInfo

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contender's go at one scenario.

    ``rate`` is the mean of arrivals a second in an open loop, ``callers`` the size of a closed one.
    ``nominal_before`` and ``nominal_after`` are seconds of a step of a lone request, drawn by the
    same pipeline each time: where they differ, the machine does. ``figures`` are the bench's own,
    in JSON's types.
    """

    scenario: str
    contender: str
    round: int
    nominal_before: float
    nominal_after: float
    drawn: list[Drawn]
    rate: float | None = None
    callers: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the start to the last image."""
        return max(each.arrival + each.latency for each in self.drawn)

    @property
    def busy_seconds(self) -> float:
        """Until the last request was asked for: in a closed loop nobody has left by then."""
        return max(each.arrival for each in self.drawn)

    @property
    def drawn_while_busy(self) -> int:
        """Images that were there by then, the one that let the last caller ask included."""
        # Its moment is the very same, but for the digits that are not saved.
        end = self.busy_seconds + 1e-4
        return sum(each.arrival + each.latency <= end for each in self.drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A bench's outcome; ``figures`` are the bench's own, in JSON's types."""

    bench: str
    date: str
    machine: MachineInfo
    versions: dict[str, str]
    model: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    note: str = ""

    @property
    def name(self) -> str:
        """The file's name, without its ending."""
        return f"{self.bench}-{self.date}-{self.machine.slug}"


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def save(results: Results, folder: Path = RESULTS) -> Path:
    """Write ``results``; replaces those of the same bench, day and machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.name}.json"
    fields = asdict(results)
    for run in fields["runs"]:
        run["drawn"] = [_short(each) for each in run["drawn"]]
    text = json.dumps(fields, indent=1)
    # What holds plain values only comes on one line, so that a person can read the file.
    text = re.sub(r"([\[{])\s+([^][{}]*?)\s+([\]}])", _on_one_line, text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _short(drawn: dict[str, Any]) -> list[Any]:
    """The fields as a list, without those at its end that say what all others do."""
    values = [round(v, 5) if isinstance(v, float) else v for v in drawn.values()]
    usual = [Outcome.IMAGE, None, None]
    while usual and values[-1] == usual[-1]:
        values.pop()
        usual.pop()
    return values


def _on_one_line(match: re.Match[str]) -> str:
    return match[1] + " ".join(match[2].split()) + match[3]


def load(path: Path) -> Results:
    """What ``save`` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["machine"] = MachineInfo(**fields["machine"])
    fields["runs"] = [
        Run(**{**run, "drawn": [_long(each) for each in run["drawn"]]}) for run in fields["runs"]
    ]
    return Results(**fields)


def _long(values: list[Any]) -> Drawn:
    drawn = Drawn(*values)
    return replace(drawn, outcome=Outcome(drawn.outcome))


def newest(bench: str, folder: Path = RESULTS) -> Results | None:
    """The latest results of ``bench``, None where there are none."""
    paths = sorted(folder.glob(f"{bench}-*.json"))
    return load(paths[-1]) if paths else None


def model_facts(info: Any) -> dict[str, Any]:
    """What a page says of a model, from its ``ModelInfo``."""
    return {
        "id": info.id,
        "revision": info.revision,
        "runtime": asdict(info.runtime),
        "max_rows": info.limits.max_rows,
        "width": info.defaults.width,
        "height": info.defaults.height,
        "scheduler": info.defaults.scheduler,
    }
