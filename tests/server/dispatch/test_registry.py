"""The queue: the waiting jobs in the order of ``core.order``, whatever came and went."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.job import Job
from darkroom_server.core.order import order
from darkroom_server.dispatch.jobs.job import ActiveJob
from darkroom_server.dispatch.jobs.registry import JobRegistry
from tests.server.jobs import make_job

MODEL = fake_model()

jobs = st.builds(
    make_job,
    submitted_at=st.floats(0, 10),
    steps=st.integers(1, 50),
    priority=st.integers(-2, 2),
    deadline=st.none() | st.floats(11, 40),
)
kinds = st.sampled_from(["look", "assign", "requeue", "extend"])
change_lists = st.lists(st.tuples(kinds, st.floats(0, 1)))


def expected(jobs: dict[str, ActiveJob]) -> list[str]:
    return [key.id[0] for key in order(active.key() for active in jobs.values())]


def ids(queue: list[ActiveJob]) -> list[str]:
    return [active.job.id for active in queue]


@given(st.lists(jobs, min_size=1, max_size=12), change_lists)
def test_the_queue_is_in_the_order_of_its_keys(
    made: list[Job], changes: list[tuple[str, float]]
) -> None:
    registry = JobRegistry()
    waiting: dict[str, ActiveJob] = {}
    running: dict[str, ActiveJob] = {}
    for number, job in enumerate(made):
        active = ActiveJob(replace(job, id=str(number)), MODEL)
        registry.enqueue(active)
        waiting[active.job.id] = active
    for change, where in changes:
        there = running if change == "requeue" else waiting
        if not there:
            continue
        active = list(there.values())[int(where * (len(there) - 1))]
        id = active.job.id
        match change:
            case "look":
                assert ids(registry.queue()) == expected(waiting)
            case "assign":
                registry.assign(active)
                running[id] = waiting.pop(id)
            case "requeue":
                active.record_crash(where)
                active.crashed_at = where
                registry.enqueue(active)
                waiting[id] = running.pop(id)
            case "extend":
                active.job = replace(active.job, deadline=50.0 * where or None)
                registry.reorder(active)
    assert ids(registry.queue()) == expected(waiting)
    new = ActiveJob(make_job("new", submitted_at=5.0), MODEL)
    assert ids(registry.queue(new)) == expected({**waiting, "new": new})
    assert ids(registry.queue()) == expected(waiting)
