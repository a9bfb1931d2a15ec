import random
import statistics

import numpy as np
import pytest

from bench.report.statistics import bootstrap_median, quantile


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17, 100])
def test_quantiles_are_numpys(count: int, share: float) -> None:
    values = [random.Random(count).gauss(0, 1) for _ in range(count)]
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_the_interval_holds_the_median_and_shrinks_with_more_values() -> None:
    rng = random.Random(0)
    many = [rng.gauss(1, 0.1) for _ in range(400)]
    wide, narrow = bootstrap_median(many[:25]), bootstrap_median(many)
    for median in (wide, narrow):
        assert median.low <= median.value <= median.high
    assert narrow.value == statistics.median(many)
    assert narrow.high - narrow.low < wide.high - wide.low
