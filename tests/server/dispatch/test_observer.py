from darkroom_server.core.events import BatchDone, Event, MemoryReport
from darkroom_server.dispatch import (
    DispatchEvent,
    JobEnded,
    JobOutcome,
    Observer,
    ReadyChanged,
)
from tests.server.dispatch.harness import dispatching, settle
from tests.server.jobs import make_job


class Recording(Observer):
    def __init__(self) -> None:
        self.events: list[Event | DispatchEvent] = []

    def on_event(self, event: Event | DispatchEvent) -> None:
        self.events.append(event)


async def test_the_observer_receives_every_change() -> None:
    observer = Recording()
    report = MemoryReport(device="cpu", by_kind={}, host_rss=1)
    async with dispatching(observer=observer, max_resident_samples=1) as (dispatcher, engine):
        observer.events.clear()
        dispatcher.submit(make_job("a", steps=1))
        dispatcher.submit(make_job("b", steps=1))
        engine.advance()
        engine._emit(report)
        await settle()
    batch = next(event for event in observer.events if isinstance(event, BatchDone))
    assert (batch.model, batch.rows, batch.samples) == ("demo", 2, 1)
    assert (
        observer.events
        == [
            batch,
            JobEnded("demo", JobOutcome.FINISHED, "decode"),
            report,
            ReadyChanged(ready=False),
            JobEnded("demo", JobOutcome.FAILED, "queue"),
            # The dispatcher closes after the drain.
            ReadyChanged(ready=False),
        ][: len(observer.events)]
    )
