"""Counters of the engine, gathered and emitted after each batch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from darkroom_server.core.events import Counted, EngineCounts, Event

Counts = Counter[Counted]


class CounterReporter:
    """Emits what the components of each model counted; used from the loop's thread only."""

    def __init__(
        self, by_model: Mapping[str, Sequence[Counts]], emit: Callable[[Event], None]
    ) -> None:
        self._by_model = by_model
        self._emit = emit

    def report(self) -> None:
        """Emit the counts since the last report, if there are any."""
        for model, parts in self._by_model.items():
            counts = Counts()
            for part in parts:
                if part:
                    counts.update(part)
                    part.clear()
            if nonzero := +counts:
                self._emit(EngineCounts(model, dict(nonzero)))
