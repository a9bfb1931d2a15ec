import pytest

from bench.workload.requests import IMAGES, STEPS, mixed, poisson, with_images


def test_the_same_seed_gives_the_same_requests() -> None:
    assert mixed(50, seed=3) == mixed(50, seed=3)
    assert mixed(50, seed=3) != mixed(50, seed=4)


@pytest.mark.parametrize("count", [1, 7, 20, 200])
def test_each_class_has_its_share(count: int) -> None:
    steps = [request.steps for request in mixed(count, seed=0)]
    assert len(steps) == count
    for wanted, share in STEPS.items():
        assert abs(steps.count(wanted) - count * share) <= 1


def test_arrivals_come_in_order_and_at_the_rate() -> None:
    arriving = poisson(mixed(4000, seed=0), rate=5.0, seed=0)
    moments = [request.arrival for request in arriving]
    assert moments == sorted(moments)
    assert moments[-1] == pytest.approx(800, rel=0.05)


@pytest.mark.parametrize("count", [1, 7, 20, 200])
def test_each_number_of_images_has_its_share(count: int) -> None:
    images = [request.images for request in with_images(mixed(count, seed=0), seed=0)]
    assert len(images) == count
    for wanted, share in IMAGES.items():
        assert abs(images.count(wanted) - count * share) <= 1
