"""Results as JSON files in ``bench/results``, from which the pages are written."""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.report.machine import MachineInfo
from bench.workload.arrivals import Answer, Outcome
from darkroom_server.core.model import ModelInfo

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One peer in one scenario.

    ``rate`` is the mean number of arrivals per second in an open loop, ``callers`` the size of a
    closed one. ``nominal_before`` and ``nominal_after`` are seconds of a step of a lone request of
    the same pipeline each time; if they differ, the speed of the machine changed. ``figures`` are
    specific to the benchmark, in JSON's types.
    """

    scenario: str
    peer: str
    round: int
    nominal_before: float
    nominal_after: float
    answers: list[Answer]
    rate: float | None = None
    callers: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the start to the last answer."""
        return max(each.arrival + each.latency for each in self.answers)

    @property
    def busy_from(self) -> float:
        """When every caller of a closed loop has had an answer; 0 for other runs and short ones.

        The speed of static batches would be too high from the start on: the last request is sent
        when a batch ends, and then they have nothing half done, as others have.
        """
        first = sorted(self.answers, key=lambda each: each.arrival)[: self.callers or 0]
        answered = max((each.arrival + each.latency for each in first), default=0.0)
        return answered if answered < self._last_request else 0.0

    @property
    def busy_seconds(self) -> float:
        """From then until the last request is sent: every caller of a closed loop is busy."""
        return self._last_request - self.busy_from

    @property
    def images_while_busy(self) -> int:
        """Images that got ready in that time, including those that triggered the last request."""
        # Its moment equals that of the last request, except for the digits that are not saved.
        end = self._last_request + 1e-4
        ready = [(each.arrival + each.latency, each.images) for each in self.answers]
        return sum(images for moment, images in ready if self.busy_from < moment <= end)

    @property
    def _last_request(self) -> float:
        return max(each.arrival for each in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The outcome of one benchmark; ``figures`` are specific to it, in JSON's types."""

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
        """The file's name without its extension."""
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
        run["answers"] = [_short(each) for each in run["answers"]]
    text = json.dumps(fields, indent=1)
    # A list or object of plain values goes on one line, which keeps the file readable.
    text = re.sub(r"([\[{])\s+([^][{}]*?)\s+([\]}])", _on_one_line, text)
    # A benchmark that is killed here leaves what it found before.
    new = path.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)
    return path


def _short(answer: dict[str, Any]) -> list[Any]:
    """The fields as a list, without default values at its end."""
    values = [round(v, 5) if isinstance(v, float) else v for v in answer.values()]
    defaults = [Outcome.IMAGE, None, None, 1]
    while defaults and values[-1] == defaults[-1]:
        values.pop()
        defaults.pop()
    return values


def _on_one_line(match: re.Match[str]) -> str:
    return match[1] + " ".join(match[2].split()) + match[3]


def load(path: Path) -> Results:
    """What ``save`` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["machine"] = MachineInfo(**fields["machine"])
    fields["runs"] = [
        Run(**{**run, "answers": [_long(each) for each in run["answers"]]})
        for run in fields["runs"]
    ]
    return Results(**fields)


def _long(values: list[Any]) -> Answer:
    answer = Answer(*values)
    return replace(answer, outcome=Outcome(answer.outcome))


def newest(bench: str, folder: Path = RESULTS) -> Results | None:
    """The latest results of ``bench``, None if there are none."""
    paths = sorted(folder.glob(f"{bench}-*.json"))
    return load(paths[-1]) if paths else None


def model_facts(info: ModelInfo) -> dict[str, Any]:
    """What the pages say about a model, from its ``ModelInfo``."""
    return {
        "id": info.id,
        "revision": info.revision,
        "runtime": asdict(info.runtime),
        "max_rows": info.limits.max_rows,
        "width": info.defaults.width,
        "height": info.defaults.height,
        "scheduler": info.defaults.scheduler,
    }
