"""Static batching around ``pipe()``, on cases worked out by hand."""

import pytest

from bench.inprocess.batching import serve_batches
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import Request, mixed

PASS_SECONDS = {1: 1.0, 2: 1.5}
DECODE_SECONDS = 0.5


class SimulatedPipe:
    """A ``pipe()`` that only advances a clock: a pass each step, then a decode of each image."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def wait_until(self, moment: float) -> None:
        self.seconds = max(self.seconds, moment)

    def __call__(self, batch: list[Request]) -> None:
        assert len({request.settings for request in batch}) == 1
        images = sum(request.images for request in batch)
        step = PASS_SECONDS.get(images, 2.5)
        self.seconds += batch[0].steps * step + images * DECODE_SECONDS


def served(arrivals: Arrivals, max_images: int) -> list[Answer]:
    pipe = SimulatedPipe()
    return serve_batches(arrivals, pipe, pipe, max_images)


def request(
    index: int, steps: int, arrival: float = 0.0, guidance: float = 4.0, images: int = 1
) -> Request:
    return Request(index, "", steps, guidance, seed=index, arrival=arrival, images=images)


def latencies(answers: list[Answer]) -> dict[int, float]:
    return {each.index: each.latency for each in answers}


def test_one_call_after_another_waits_for_earlier_ones() -> None:
    arrivals = Arrivals([request(0, 4), request(1, 2, arrival=1.0), request(2, 1, arrival=20.0)])
    assert latencies(served(arrivals, 1)) == {0: 4.5, 1: 4.5 + 2.5 - 1.0, 2: 1.5}


def test_a_batch_holds_equal_settings_and_the_oldest_goes_first() -> None:
    requests = [
        request(0, 2),
        request(1, 2, guidance=7.5),
        request(2, 2, guidance=7.5),
        request(3, 2),
    ]
    assert latencies(served(Arrivals(requests), 8)) == {0: 4.0, 3: 4.0, 1: 8.0, 2: 8.0}


def test_the_images_of_a_call_are_counted_and_a_request_is_not_split() -> None:
    requests = [request(0, 2), request(1, 2, images=2), request(2, 2), request(3, 1, images=4)]
    answers = served(Arrivals(requests), 2)
    assert latencies(answers) == {0: 4.0, 2: 4.0, 1: 8.0, 3: 12.5}
    assert [each.images for each in answers] == [1, 1, 2, 4]


@pytest.mark.parametrize("max_images", [1, 8])
def test_a_closed_loop_serves_everything_and_never_has_more_callers(max_images: int) -> None:
    answers = served(Arrivals(mixed(40, seed=0), callers=3), max_images)
    assert sorted(each.index for each in answers) == list(range(40))
    for each in answers:
        in_flight = [d for d in answers if d.arrival <= each.arrival < d.arrival + d.latency]
        assert len(in_flight) <= 3
