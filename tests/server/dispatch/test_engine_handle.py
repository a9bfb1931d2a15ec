"""What the dispatcher knows about one engine."""

from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import BatchDone, EngineReady
from darkroom_server.dispatch.engines.handle import EngineHandle
from darkroom_server.dispatch.estimation.batch_times import Group

SMALL, LARGE = Group("demo", 64, 64), Group("demo", 128, 128)


def batch_done(group: Group, max_rows: int) -> BatchDone:
    return BatchDone(
        model=group.model,
        width=group.width,
        height=group.height,
        rows=2,
        seconds=0.1,
        max_rows=max_rows,
    )


def test_the_handle_follows_the_row_limit_of_the_engine() -> None:
    handle = EngineHandle(0, FakeEngine())
    handle.set_ready(EngineReady((fake_model(),), 0.0))
    usual = handle.load().max_rows(LARGE)
    assert usual > 2
    handle.record_batch(batch_done(LARGE, 2))
    assert handle.load().max_rows(LARGE) == 2
    assert handle.load().max_rows(SMALL) >= usual
    handle.record_batch(batch_done(LARGE, usual))
    assert handle.load().max_rows(LARGE) == usual
    handle.record_batch(batch_done(LARGE, 2))
    handle.set_dead()
    assert handle.load().max_rows(LARGE) == usual, "a new engine starts with its own limits"
