"""The series that every pass counts in: the one path that is taken dozens of times a second."""

from darkroom_server.core.events import BatchDone
from darkroom_server.telemetry.metrics.engine import EngineMetrics


class BatchMetrics:
    """Those of one model and class of rows, looked up once."""

    def __init__(self, engine: EngineMetrics, model: str, rows: str) -> None:
        self._seconds = engine.step_seconds.labels(model, rows)
        self._rows = engine.rows_per_step.labels(model)
        self._steps = engine.steps.labels(model)
        self._occupancy = engine.occupancy.labels(model)
        self._joins = engine.joins.labels(model)

    def count(self, done: BatchDone) -> None:
        """Count one pass."""
        self._seconds.observe(done.seconds)
        self._rows.observe(done.rows)
        self._steps.inc(done.samples)
        if done.max_rows:
            self._occupancy.observe(min(1.0, done.rows / done.max_rows))
        if done.joined:
            self._joins.inc(done.joined)
