from darkroom_server.core.events import BatchDone, EngineCounts, MemoryReport, PeakMeasured
from darkroom_server.dispatch import NullObserver
from tests.server.dispatch.desk import dispatching, settle
from tests.server.jobs import make_job


class Recording(NullObserver):
    def __init__(self) -> None:
        self.told: list[object] = []

    def ready(self, ready: bool) -> None:
        self.told.append(("ready", ready))

    def jobs(self, model: str, queued: int, running: int) -> None:
        self.told.append((model, queued, running))

    def batch_done(self, done: BatchDone) -> None:
        self.told.append(("pass", done.model, done.rows, done.samples))

    def ended(self, model: str, end: str, phase: str) -> None:
        self.told.append((model, end, phase))

    def wasted(self, model: str, seconds: float) -> None:
        self.told.append(("wasted", model, seconds))

    def counted(self, counts: EngineCounts) -> None:
        self.told.append(counts)

    def peak(self, peak: PeakMeasured) -> None:
        self.told.append(peak)

    def memory(self, report: MemoryReport) -> None:
        self.told.append(report)


async def test_the_observer_is_told_what_changes() -> None:
    observer = Recording()
    report = MemoryReport(device="cpu", by_kind={}, host_rss=1)
    async with dispatching(observer=observer, max_resident_samples=1) as (dispatcher, engine):
        dispatcher.submit(make_job("a", steps=1))
        dispatcher.submit(make_job("b", steps=1))
        engine.advance()
        engine._emit(report)
        await settle()
    assert observer.told == [
        ("ready", True),
        ("demo", 1, 0),
        ("demo", 0, 1),
        ("demo", 1, 1),
        ("pass", "demo", 2, 1),
        ("demo", 1, 0),
        ("demo", "finished", "decode"),
        ("demo", 0, 1),
        report,
        ("ready", False),
        ("demo", "failed", "queue"),
    ]
