"""The ledger in memory: it ends with the server, and costs no file and no service."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from darkroom_server.core.errors import Failure, RequestConflict
from darkroom_server.core.ledger import (
    Begun,
    Draft,
    Entry,
    Hold,
    Key,
    Models,
    ServerEntry,
    Standing,
)
from darkroom_server.ledger.changes import Changes
from darkroom_server.ledger.input_limits import NO_LIMITS, InputLimits, Named, evicted
from darkroom_server.ledger.rows import runtime_of
from darkroom_server.ledger.rules import LATE, queue_is_full, too_many_jobs

ME = 1
"""The only server that has this ledger."""


@dataclass(slots=True)
class _Row:
    """An entry with its times in ``time.monotonic`` seconds."""

    draft: Draft
    accepted_at: float
    deadline: float | None
    detached: bool
    standing: Standing
    epoch: int
    runtime: str | None
    ended_at: float | None = None
    failure: Failure | None = None

    @property
    def goal(self) -> tuple[float, float]:
        return self.accepted_at + self.draft.goal, self.accepted_at

    def fits(self, models: Models) -> bool:
        """Whether a server with ``models`` may run it."""
        runtime = models.runtimes.get(self.draft.model)
        return models.fit(self.draft.needs) and self.may_run_on(runtime)

    def may_run_on(self, runtime: str | None) -> bool:
        """Whether a server that has its model with ``runtime`` may; None: that has it not."""
        return runtime is not None and self.runtime in (None, "", runtime)


class MemoryLedger:
    """Keeps entries in this process: ended ones for ``retention`` seconds, 0 keeps none.

    Their inputs are within ``inputs``.
    """

    durable = False

    def __init__(
        self, *, name: str = "", retention: float = 0.0, inputs: InputLimits = NO_LIMITS
    ) -> None:
        self._name = name
        self._retention = retention
        self._input_limits = inputs
        self._rows: dict[Key, _Row] = {}
        """In the order of acceptance."""
        self._opened_at = time.monotonic()
        self._changes = Changes()

    async def open(self) -> int:
        """Nothing outlived an earlier server."""
        self._opened_at = time.monotonic()
        return 0

    async def close(self) -> None:
        """Nothing is under way."""

    async def begin(self, draft: Draft, *, claimed: bool) -> Begun:
        """As ``Ledger.begin``."""
        row = self._rows.get(draft.key)
        now = time.monotonic()
        if row is not None:
            if row.draft.fingerprint != draft.fingerprint:
                raise RequestConflict(draft.key.request_id)
            if not row.standing.ended or row.standing is Standing.FINISHED:
                if not row.standing.ended:
                    self._extend(row, draft, now)
                return Begun(self._entry(draft.key, row, now), new=False)
        self._check(draft, claimed)
        accepted_at = now - draft.age
        fresh = _Row(
            draft=draft,
            accepted_at=accepted_at,
            deadline=None if draft.deadline is None else accepted_at + draft.deadline,
            detached=draft.detached,
            standing=Standing.CLAIMED if claimed else Standing.QUEUED,
            epoch=1 if row is None else row.epoch + 1,
            runtime=runtime_of(draft, claimed=claimed),
        )
        self._rows.pop(draft.key, None)
        self._rows[draft.key] = fresh
        self._changes.publish(draft.key)
        return Begun(self._entry(draft.key, fresh, now), new=True)

    async def claim(
        self,
        room: int,
        *,
        models: Models | None = None,
        key: Key | None = None,
        delay: float = 0.0,
    ) -> list[Entry]:
        """As ``Ledger.claim``; no other server has a model in memory."""
        now = time.monotonic()
        if key is None:
            self._expire(now)
        found = [
            (each, row)
            for each, row in self._rows.items()
            if row.standing is Standing.QUEUED
            and (models is None or row.fits(models))
            and (key is None or each == key)
        ]
        found.sort(key=lambda pair: pair[1].goal)
        for each, row in found[:room]:
            row.standing = Standing.CLAIMED
            row.epoch += 1
            if row.runtime == "" and models is not None:
                row.runtime = models.runtimes[row.draft.model]
            self._changes.publish(each)
        return [self._entry(each, row, now) for each, row in found[:room]]

    async def end(self, hold: Hold, standing: Standing, failure: Failure | None = None) -> bool:
        """As ``Ledger.end``."""
        row = self._held(hold)
        if row is None:
            return False
        row.failure = failure
        self._set_ended(row, standing)
        self._changes.publish(hold.key)
        self._trim()
        return True

    async def release(self, holds: Sequence[Hold]) -> int:
        """As ``Ledger.release``."""
        released = 0
        for hold in holds:
            row = self._held(hold)
            if row is not None and row.standing is Standing.CLAIMED:
                row.standing = Standing.QUEUED
                row.epoch += 1
                released += 1
                self._changes.publish(hold.key)
        return released

    async def find(self, key: Key) -> Entry | None:
        """As ``Ledger.find``."""
        row = self._rows.get(key)
        return None if row is None else self._entry(key, row, time.monotonic())

    async def cancel(self, key: Key) -> Entry | None:
        """As ``Ledger.cancel``."""
        row = self._rows.get(key)
        if row is None:
            return None
        now = time.monotonic()
        if row.standing is Standing.QUEUED:
            self._set_ended(row, Standing.CANCELLED)
            self._changes.publish(key)
        entry = self._entry(key, row, now)
        self._trim()
        return entry

    async def again(self, key: Key, runtime: str | None) -> Entry | None:
        """As ``Ledger.again``."""
        row = self._rows.get(key)
        if row is None or row.standing is not Standing.FINISHED or not row.may_run_on(runtime):
            return None
        row.standing, row.ended_at, row.deadline = Standing.CLAIMED, None, None
        row.epoch += 1
        self._changes.publish(key)
        return self._entry(key, row, time.monotonic())

    async def mine(self) -> list[Entry]:
        """As ``Ledger.mine``."""
        now = time.monotonic()
        return [self._entry(key, row, now) for key, row in self._rows.items()]

    async def inputs(self, key: Key) -> dict[str, bytes]:
        """As ``Ledger.inputs``."""
        row = self._rows.get(key)
        return {} if row is None else dict(row.draft.inputs)

    async def forget(self, holds: Sequence[Hold]) -> None:
        """As ``Ledger.forget``."""
        for key, epoch in holds:
            row = self._rows.get(key)
            if row is not None and row.standing.ended and row.epoch == epoch:
                del self._rows[key]

    async def renew(self) -> None:
        """As ``Ledger.renew``."""
        self._trim()

    async def servers(self) -> list[ServerEntry]:
        """As ``Ledger.servers``."""
        return [ServerEntry(id=ME, name=self._name, age=time.monotonic() - self._opened_at)]

    def changes(self) -> AsyncIterator[Key]:
        """As ``Ledger.changes``."""
        return self._changes.listen()

    def _held(self, hold: Hold) -> _Row | None:
        row = self._rows.get(hold.key)
        return row if row and row.epoch == hold.epoch and not row.standing.ended else None

    def _expire(self, now: float) -> None:
        """End the queued jobs whose deadline has passed."""
        for key, row in self._rows.items():
            late = row.deadline is not None and row.deadline <= now
            if late and row.standing is Standing.QUEUED:
                row.failure = LATE
                self._set_ended(row, Standing.EXPIRED)
                self._changes.publish(key)

    def _set_ended(self, row: _Row, standing: Standing) -> None:
        row.standing, row.ended_at = standing, time.monotonic()
        if standing is not Standing.FINISHED:
            row.draft = replace(row.draft, inputs={})  # It never runs from this entry again.

    def _extend(self, row: _Row, draft: Draft, now: float) -> None:
        row.detached |= draft.detached
        if row.deadline is not None:
            asked = None if draft.deadline is None else now - draft.age + draft.deadline
            row.deadline = None if asked is None else max(row.deadline, asked)

    def _check(self, draft: Draft, claimed: bool) -> None:
        """Raise ``QuotaExceeded`` or ``QueueFull`` if the draft has no place."""
        if draft.max_queued is not None and not claimed:
            queued = sum(row.standing is Standing.QUEUED for row in self._rows.values())
            if queued >= draft.max_queued:
                raise queue_is_full(queued)
        if draft.max_live is not None:
            live = sum(
                not row.standing.ended and row.draft.counted_as == draft.counted_as
                for row in self._rows.values()
            )
            if live >= draft.max_live:
                raise too_many_jobs(draft, live)
        if draft.inputs:
            self._make_room(draft)

    def _make_room(self, draft: Draft) -> None:
        """Delete the oldest ended entries with inputs until those of ``draft`` fit."""
        named = [
            Named(key, row.draft.counted_as, row.ended_at is not None, digest, len(data))
            for key, row in sorted(self._rows.items(), key=lambda pair: pair[1].ended_at or 0.0)
            for digest, data in row.draft.inputs.items()
        ]
        for key in evicted(draft, named, self._input_limits):
            del self._rows[key]

    def _trim(self) -> None:
        """Delete the entries that ended more than ``retention`` seconds ago."""
        before = time.monotonic() - self._retention
        for key, row in list(self._rows.items()):
            if row.ended_at is not None and row.ended_at <= before:
                del self._rows[key]

    def _entry(self, key: Key, row: _Row, now: float) -> Entry:
        return Entry(
            key=key,
            standing=row.standing,
            owner=None if row.standing is Standing.QUEUED else ME,
            epoch=row.epoch,
            losses=0,
            fingerprint=row.draft.fingerprint,
            record=row.draft.record,
            model=row.draft.model,
            counted_as=row.draft.counted_as,
            detached=row.detached,
            age=now - row.accepted_at,
            goal=row.goal[0] - now,
            remaining=None if row.deadline is None else row.deadline - now,
            ended_for=None if row.ended_at is None else now - row.ended_at,
            failure=row.failure,
            runtime=row.runtime,
            needs=row.draft.needs,
        )
