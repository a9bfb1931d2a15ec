"""How fast a cancel at another server ends a job, measured on two real servers."""

import pytest

from bench.serving.fleet_cancels import NAMES, measure_cancels
from tools.postgres import cluster


@pytest.mark.needs("postgresql")
def test_cancels_are_timed_until_the_engine_has_removed_their_jobs() -> None:
    with cluster() as database:
        seconds = measure_cancels(database, 2)
    assert seconds.keys() == NAMES.keys()
    for reached, removed in zip(seconds["reached"], seconds["removed"], strict=True):
        assert 0 < reached <= removed
