"""A short form of `make model-chaos`."""

from pathlib import Path

from tests.faults.model_chaos import MODELS, MORE_DESCRIPTORS, chaos
from tests.faults.served_models import write_models


async def test_random_loads_and_unloads_lose_no_job(tmp_path: Path) -> None:
    write_models(tmp_path, MODELS)
    report = await chaos(tmp_path, changes=30, seed=7)
    assert report.wrong == []
    assert report.answered >= 3
    assert sum(report.changes.values()) == 30
    assert report.loads["disk"] >= 4
    assert report.loads["host"] >= 1
    assert report.descriptors[-1] <= report.descriptors[0] + MORE_DESCRIPTORS
