"""The batch scheduler, with plain samples and without torch."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import pytest

from darkroom_server.core.errors import Failure, Reason
from darkroom_server.core.events import Event, JobCancelled, JobFailed, JobStarted
from darkroom_server.core.job import Job
from darkroom_server.core.model import MemoryNeeds
from darkroom_server.core.order import OrderKey
from darkroom_server.engine.batch import Batch, Group
from darkroom_server.engine.batching.residency import Residency
from darkroom_server.engine.batching.row_limits import RowLimits
from darkroom_server.engine.batching.scheduler import BatchScheduler
from tests.server.jobs import make_job

NEEDS = MemoryNeeds(pixels=64 * 64, bytes_per_row=1, bytes_per_decode=1, available_bytes=10**6)
TIMER: Any = None
FAILURE = Failure(Reason.ENGINE_FAILED, "broken")


@dataclass
class PlainSample:
    """What the scheduler reads of a sample."""

    job: Job
    index: int = 0
    step: int = 0
    engine_seconds: float = 0.0
    closed: bool = False

    @property
    def steps(self) -> int:
        return self.job.steps

    @property
    def rows(self) -> int:
        return 2 if self.job.guidance_scale > 1.0 else 1

    @property
    def group(self) -> Group:
        return Group(self.job.model, self.job.width, self.job.height)

    def close(self) -> None:
        self.closed = True

    def key(self) -> OrderKey:
        return OrderKey(
            id=(self.job.id, self.index),
            submitted_at=self.job.submitted_at,
            remaining_steps=self.job.steps - self.step,
            rows=self.rows,
            alone=self.job.exact,
        )


class Bench:
    """A scheduler of one model, whose batches take a second each."""

    def __init__(self, residency: Residency | None = None, *, max_rows: int = 8) -> None:
        self.events: list[Event] = []
        self.limits = RowLimits(max_rows, NEEDS)
        self.all_limits = {"demo": self.limits, "other": RowLimits(max_rows, NEEDS)}
        self.scheduler = BatchScheduler(
            self.all_limits, residency or Residency({}), self.events.append
        )

    def slow_scheduler(self) -> BatchScheduler:
        """A scheduler that takes prompts of ``demo`` to be slow to encode."""
        return BatchScheduler(
            self.all_limits, Residency({}), self.events.append, encode_slowly={"demo"}
        )

    def take(self) -> list[str]:
        """The ids of the jobs whose prompts are encoded now."""
        return [r.job.id for found in self.scheduler.take_newcomers().values() for r in found]

    def start(self, id: str, **fields: Any) -> list[PlainSample]:
        """A job whose prompts are encoded."""
        job = make_job(id, **fields)
        self.scheduler.add(job)
        assert [r.job for r in self.scheduler.take_newcomers()[job.model]] == [job]
        samples = [PlainSample(job, index) for index in job.image_indices]
        self.scheduler.start(id, cast(Any, samples), TIMER)
        return samples

    def run(self, seconds: float = 1.0) -> list[str]:
        """Run one batch, which takes ``seconds``; returns its jobs."""
        batch = self.scheduler.next_batch()
        assert batch is not None
        for sample in batch.samples:
            sample.step += 1
        self.scheduler.charge(batch, seconds)
        return [sample.job.id for sample in batch.samples]

    def batch(self) -> Batch:
        batch = self.scheduler.next_batch()
        assert batch is not None
        return batch


def test_it_imports_no_torch() -> None:
    code = """
import sys
for name in ("torch", "numpy", "diffusers", "transformers"):
    sys.modules[name] = None
{}
from darkroom_server.engine.batching.scheduler import BatchScheduler
assert BatchScheduler({{}}, None, print).next_batch() is None
"""
    subprocess.run([sys.executable, "-c", code.format("")], check=True, timeout=60)
    blocked = code.format("import darkroom_server.engine.batching.runner")
    result = subprocess.run(
        [sys.executable, "-c", blocked], check=False, capture_output=True, timeout=60
    )
    assert b"ModuleNotFoundError" in result.stderr, "the block works"


def test_without_jobs_there_is_no_batch() -> None:
    bench = Bench()
    assert bench.scheduler.idle
    assert bench.scheduler.next_batch() is None
    bench.scheduler.add(make_job("new"))
    assert not bench.scheduler.idle
    assert bench.scheduler.next_batch() is None, "its prompts are not encoded"


def test_newcomers_come_once_and_by_model() -> None:
    bench = Bench()
    for id, model in (("a", "demo"), ("b", "other"), ("c", "demo")):
        bench.scheduler.add(make_job(id, model=model))
    found = bench.scheduler.take_newcomers()
    assert {m: [r.job.id for r in rs] for m, rs in found.items()} == {
        "demo": ["a", "c"],
        "other": ["b"],
    }
    assert bench.scheduler.take_newcomers() == {}


def test_slow_encodes_take_turns_with_a_batch_of_every_group() -> None:
    bench = Bench()
    bench.scheduler = BatchScheduler(
        bench.all_limits, Residency({}), bench.events.append, encode_slowly={"demo"}
    )
    bench.start("small", model="other")
    bench.start("large", model="other", width=128)
    for id in ("a", "b", "c"):
        bench.scheduler.add(make_job(id))
    taken = [bench.take()]
    for _ in range(5):
        bench.run()
        taken.append(bench.take())
    assert taken == [["a"], [], ["b"], [], ["c"], []]


def test_slow_encodes_follow_each_other_if_nothing_runs() -> None:
    bench = Bench()
    bench.scheduler = BatchScheduler(
        bench.all_limits, Residency({}), bench.events.append, encode_slowly={"demo"}
    )
    for id in ("a", "b"):
        bench.scheduler.add(make_job(id))
    assert [bench.take(), bench.take(), bench.take()] == [["a"], ["b"], []]


def test_samples_of_one_group_share_a_batch_up_to_the_row_limit() -> None:
    bench = Bench(max_rows=6)
    for index, id in enumerate("abcd"):
        bench.start(id, submitted_at=float(index))
    batch = bench.batch()
    assert [sample.job.id for sample in batch.samples] == ["a", "b", "c"]
    assert (batch.rows, batch.model, batch.group.width) == (6, "demo", 64)
    bench.limits.record_out_of_memory(batch.group, 6)
    assert bench.batch().rows == 2, "3 rows hold one sample with guidance"


def test_only_samples_that_join_others_are_counted_as_joined() -> None:
    bench = Bench()
    bench.start("a")
    assert bench.batch().joined == 0
    bench.run()
    bench.start("b", image_count=2)
    assert (bench.batch().joined, len(bench.batch().samples)) == (2, 3)
    bench.run()
    assert bench.batch().joined == 0


@pytest.mark.parametrize("others", range(6))
def test_the_images_of_a_job_start_together(others: int) -> None:
    bench = Bench(max_rows=16)
    for i in range(others):
        bench.start(f"other-{i}", submitted_at=0.0)
    if others:
        bench.run()
    bench.start("several", image_count=8, submitted_at=1.0)
    assert bench.run().count("several") == 8 - others, "as many as there is room for"
    for i in range(others):
        bench.scheduler.cancel(f"other-{i}")
    assert bench.run().count("several") == 8


def test_one_job_starts_whole_before_the_next_one() -> None:
    bench = Bench(max_rows=16)
    for id in ("first", "second"):
        bench.start(id, image_count=6)
    assert Counter(bench.run()) == {"first": 6, "second": 2}


def test_an_exact_job_runs_alone() -> None:
    bench = Bench()
    bench.start("exact", exact=True, submitted_at=0.0)
    bench.start("other", submitted_at=1.0)
    assert bench.run() == ["exact"]


def test_groups_take_turns() -> None:
    bench = Bench()
    bench.start("small", submitted_at=0.0)
    bench.start("large", width=128, submitted_at=0.0)
    bench.start("else", model="other", submitted_at=0.0)
    turns = Counter(job for _ in range(8) for job in bench.run())
    assert turns == {"small": 2, "large": 2, "else": 4}, "models share the time"


def test_sizes_of_a_model_share_its_turns_and_models_share_the_time() -> None:
    bench = Bench()
    seconds = {"small": 0.1, "large": 0.4, "other": 0.5}
    bench.start("small", steps=900)
    bench.start("large", steps=900, width=128)
    bench.start("other", steps=900, model="other")
    taken: Counter[str] = Counter()
    for _ in range(300):
        group = bench.batch().samples[0].job.id
        taken.update(bench.run(seconds[group]))
    assert taken == {"small": 100, "large": 100, "other": 100}
    bench.scheduler.cancel("large")
    taken.clear()
    for _ in range(300):
        taken.update(bench.run(seconds[bench.batch().samples[0].job.id]))
    assert taken["small"] == pytest.approx(250, abs=2), "0.1 s each, beside 0.5 s"


def test_the_start_of_a_job_is_emitted_once() -> None:
    bench = Bench()
    bench.start("a", image_count=2)
    bench.scheduler.begin(bench.batch(), 1.0)
    bench.scheduler.begin(bench.batch(), 2.0)
    assert bench.events == [JobStarted("a")]


def test_a_cancelled_job_is_removed_with_all_its_samples() -> None:
    bench = Bench()
    for sample in bench.start("a", image_count=2):
        sample.engine_seconds = 1.5
    bench.start("b")
    bench.scheduler.cancel("a")
    bench.scheduler.cancel("a")
    bench.scheduler.cancel("unknown")
    assert bench.events == [JobCancelled("a", expired=False, wasted_seconds=3.0)]
    assert bench.run() == ["b"]
    bench.scheduler.cancel("b")
    assert bench.scheduler.idle


def test_a_newcomer_can_be_cancelled() -> None:
    bench = Bench()
    bench.scheduler.add(make_job("new"))
    bench.scheduler.cancel("new")
    assert bench.scheduler.take_newcomers() == {}
    assert bench.scheduler.idle
    assert isinstance(bench.events[0], JobCancelled)


def test_jobs_expire_at_their_deadline_unless_it_is_extended() -> None:
    bench = Bench()
    bench.start("late", deadline=10.0)
    (extended,) = bench.start("extended", deadline=10.0)
    bench.start("patient")
    bench.scheduler.extend("extended", 20.0)
    bench.scheduler.extend("unknown", 20.0)
    assert extended.job.deadline == 20.0
    bench.scheduler.expire(9.9)
    assert bench.events == []
    bench.scheduler.expire(10.0)
    assert bench.events == [JobCancelled("late", expired=True, wasted_seconds=0.0)]
    bench.scheduler.expire(20.0)
    assert [getattr(e, "job_id", None) for e in bench.events] == ["late", "extended"]
    assert bench.run() == ["patient"]


def test_a_failed_job_is_removed() -> None:
    bench = Bench()
    bench.start("a", image_count=2)
    bench.scheduler.fail("a", FAILURE)
    assert bench.events == [JobFailed("a", FAILURE)]
    assert "a" not in bench.scheduler
    assert bench.scheduler.idle


def test_a_job_that_ended_in_the_encode_pool_takes_no_more_steps() -> None:
    bench = Bench()
    (first, _) = bench.start("a", image_count=2)
    resident = bench.scheduler.job_of(cast(Any, first))
    resident.end(JobFailed("a", FAILURE))
    assert not bench.scheduler.idle
    bench.scheduler.expire(0.0)
    assert bench.events == [JobFailed("a", FAILURE)], "no second end"
    assert bench.scheduler.idle


def test_a_job_stays_until_its_last_image_is_decoded() -> None:
    bench = Bench()
    first, second = cast(Any, bench.start("a", image_count=2))
    bench.scheduler.denoised(first, 1.0)
    assert bench.batch().samples == (second,)
    bench.scheduler.denoised(second, 2.0)
    assert bench.scheduler.next_batch() is None
    bench.scheduler.decoded(first, 3.0)
    assert "a" in bench.scheduler
    bench.scheduler.decoded(second, 4.0)
    assert "a" not in bench.scheduler
    with pytest.raises(KeyError):
        bench.scheduler.job_of(first)
    assert bench.events == []
