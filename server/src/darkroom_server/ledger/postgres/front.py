"""Where the queue of a PostgreSQL ledger begins: no queued job has an earlier goal.

A job that leaves the queue leaves a dead row in its index. As long as any transaction is open that
could see it, every search from the beginning of the index would visit it again: with a transaction
of ten minutes, all jobs of ten minutes. So searches begin at the front.
"""

import math
import time

LATEST = 1.0
"""A job that is late by more when it is accepted counts as late by this."""

MARGIN_SECONDS = LATEST + 6.0
"""A job that becomes visible now, after its commit, has no earlier goal than that many seconds ago:
a longer commit fails. In that time jobs come and go whose rows every search visits."""

CHECK_SECONDS = 60.0
"""Until a search begins at the beginning again, to find what no rule foresaw: such as a commit that
a replica held up."""


class Front:
    """``goal``: where a search begins, in the database's seconds."""

    def __init__(self) -> None:
        self.goal = -math.inf
        self._checked_at = -math.inf
        self._returned = math.inf
        self._now = -math.inf

    def forget(self) -> None:
        """Nothing is known of the queue."""
        self.goal = -math.inf

    def back(self, goal: float) -> None:
        """A job returned to the queue."""
        self.goal = min(self.goal, goal)
        self._returned = min(self._returned, goal)

    def asked(self) -> float:
        """The goal from which the first one is looked for now; ``found`` takes the answer."""
        if time.monotonic() > self._checked_at + CHECK_SECONDS:
            self.forget()
            self._checked_at = time.monotonic()
        self._returned = math.inf
        return self.goal

    def found(self, first: float | None, now: float) -> None:
        """``first``: the earliest goal of the queued jobs, None if there is none.

        A job that returned meanwhile may not have been seen.
        """
        earliest = math.inf if first is None else first
        self.goal = min(earliest, now - MARGIN_SECONDS, self._returned)
        if now < self._now:
            self.forget()  # The clock was set back, and so are the goals of new jobs.
        self._now = now
