"""What happens in the engine besides passes, counted until it is told."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from darkroom_server.core.events import Counted, EngineCounts, Event

Counts = Counter[Counted]


class CounterReporter:
    """Gathers what the parts of each model counted; used from the loop's thread only."""

    def __init__(
        self, by_model: Mapping[str, Sequence[Counts]], emit: Callable[[Event], None]
    ) -> None:
        self._by_model = by_model
        self._emit = emit

    def tell(self) -> None:
        """Tell what was counted since the last time, if anything was."""
        for model, parts in self._by_model.items():
            counts = Counts()
            for part in parts:
                if part:
                    counts.update(part)
                    part.clear()
            if told := +counts:  # Without the zeros.
                self._emit(EngineCounts(model, dict(told)))
