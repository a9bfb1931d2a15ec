"""Simulates what the servers of a fleet ask their ledger, by the rules of ``fleet.member``.

Jobs arrive at random servers. One that finds room begins there; another one waits in the ledger,
and its caller watches it. Servers claim when they are notified, when a job has left while others
wait, and each second. Operations and their order are simulated, not their time: a claim takes none.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from darkroom_server.dispatch.entries import RENEW_SECONDS
from darkroom_server.fleet.member import BEAT_SECONDS, CLAIM_AT_ONCE, POLL_SECONDS
from darkroom_server.fleet.mirrors import FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS
from darkroom_server.ledger.postgres.session import VOLUNTEERS

WARM_UP_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``engines``: of each server; ``resident``: jobs in an engine at once.

    ``load``: the part of the fleet's capacity that jobs take.
    """

    servers: int
    engines: int
    resident: int
    jobs_per_second: float
    load: float

    @property
    def places(self) -> int:
        """Of one server."""
        return self.engines * self.resident

    @property
    def job_seconds(self) -> float:
        """How long a job runs on average."""
        return self.load * self.servers * self.places / self.jobs_per_second


class _Server:
    def __init__(self) -> None:
        self.running = 0
        self.wakes_on_room = False


class FleetSimulation:
    """Counts the operations of a fleet by name in ``counts``; ``longest``: the queue's length."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.longest = 0
        self._plan = plan
        self._dice = random.Random(seed)
        self._servers = [_Server() for _ in range(plan.servers)]
        self._queue = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._now = 0.0

    def run(self, seconds: float) -> dict[str, float]:
        """Operations a second by name, over ``seconds`` after a warm-up."""
        for server in self._servers:
            self._after(self._dice.uniform(0, BEAT_SECONDS), partial(self._beat, server))
            self._after(self._dice.uniform(0, POLL_SECONDS), partial(self._poll, server))
            self._after(self._dice.uniform(0, RENEW_SECONDS), self._trim)
        self._after(0.0, self._arrive)
        self._run_until(WARM_UP_SECONDS)
        self.counts.clear()
        self.longest = 0
        self._run_until(WARM_UP_SECONDS + seconds)
        return {name: count / seconds for name, count in sorted(self.counts.items())}

    def _run_until(self, end: float) -> None:
        while self._events[0][0] < end:
            self._now, _, event = heapq.heappop(self._events)
            event()

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._serial), event))

    # What happens.

    def _arrive(self) -> None:
        self._after(self._dice.expovariate(self._plan.jobs_per_second), self._arrive)
        server = self._dice.choice(self._servers)
        if server.running < self._plan.places:
            self.counts["begin"] += 1
            self._start(server)
            return
        self.counts["queue"] += 1
        self._queue += 1
        self.longest = max(self.longest, self._queue)
        self._watch(FIRST_LOOK_SECONDS, self._queue)
        if self._queue == 1:  # The notification.
            for each in self._dice.sample(self._servers, len(self._servers)):
                if self._volunteers():
                    self._claim(each)

    def _watch(self, seconds: float, ahead: int) -> None:
        """The caller's server looks at the job until a server has it: ``ahead`` claims from now."""
        self.counts["find"] += 1
        claimed = self.counts["claimed"]

        def look() -> None:
            behind = ahead - (self.counts["claimed"] - claimed)
            if behind > 0:
                self._watch(min(2 * seconds, LONGEST_LOOK_SECONDS), behind)
            else:
                self.counts["servers"] += 1

        self._after(seconds * self._dice.uniform(0.5, 1.0), look)

    def _start(self, server: _Server) -> None:
        server.running += 1
        self._after(
            self._dice.expovariate(1 / self._plan.job_seconds), lambda: self._finish(server)
        )

    def _finish(self, server: _Server) -> None:
        self.counts["end"] += 1
        server.running -= 1
        if server.wakes_on_room:
            self._claim(server)

    # What servers do by themselves.

    def _beat(self, server: _Server) -> None:
        self._after(BEAT_SECONDS * self._dice.uniform(0.8, 1.0), lambda: self._beat(server))
        self.counts["beat"] += 1
        if self._volunteers():
            self.counts["reap"] += 1
        if self._queue:
            self._claim(server)

    def _volunteers(self) -> bool:
        return self._dice.random() < VOLUNTEERS / self._plan.servers

    def _poll(self, server: _Server) -> None:
        self._after(POLL_SECONDS * self._dice.uniform(0.5, 1.0), lambda: self._poll(server))
        self._claim(server)

    def _trim(self) -> None:
        self._after(RENEW_SECONDS, self._trim)
        self.counts["renew"] += 1

    def _claim(self, server: _Server) -> None:
        server.wakes_on_room = True
        while (room := min(self._plan.places - server.running, CLAIM_AT_ONCE)) > 0:
            found = min(room, self._queue)
            self.counts["claim" if found else "empty claim"] += 1
            self.counts["claimed"] += found
            self._queue -= found
            for _ in range(found):
                self._start(server)
            if found < room:
                server.wakes_on_room = False
                return
