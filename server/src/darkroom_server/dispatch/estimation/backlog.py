"""How much work is here: seconds until it is done."""

import time
from collections.abc import Mapping


class Backlog:
    """When the jobs that are here have finished, as last estimated; any thread may read it.

    ``finish_at``: by model, in ``time.monotonic`` seconds. It is replaced as a whole; models
    without a job are not in it.
    """

    def __init__(self) -> None:
        self.finish_at: Mapping[str, float] = {}

    def seconds(self, model: str) -> float:
        """Seconds until the jobs of ``model`` have finished; 0 if there are none."""
        return max(0.0, self.finish_at.get(model, 0.0) - time.monotonic())
