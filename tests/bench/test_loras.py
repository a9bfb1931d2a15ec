"""The engines that the benchmark of LoRA rows compares."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from bench.engine.adapter_groups import write_adapters
from bench.engine.loras import NAMES, EngineProcess, batch_times, job_with
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from tests.engine.tiny import write_tiny_model


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with contextlib.closing(EngineProcess()) as process:
        yield process


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", NAMES)
def test_each_engine_serves_and_batches_as_its_name_says(
    name: str, engine: EngineProcess, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    sources = write_adapters(tmp_path, pipeline, 2)
    models = (ModelSource(id="tiny", location=str(folder)),)
    info = engine.start(EngineConfig(models=models, rows=8, adapters=tuple(sources)), name)
    jobs = [replace(job_with(info, i, 2), steps=4) for i in range(4)]
    rate, most = engine.images_per_second(jobs)
    assert rate > 0
    assert (most > 1) is (name == "mixed")


def test_single_batches_run_with_adapters_and_without(
    engine: EngineProcess, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    sources = write_adapters(tmp_path, pipeline, 4)
    models = (ModelSource(id="tiny", location=str(folder)),)
    config = EngineConfig(models=models, rows=8, adapters=tuple(sources))
    seconds = engine.call(batch_times, config, 3)
    assert {name: len(each) for name, each in seconds.items()} == {"four": 3, "none": 3}
    assert all(each > 0 for name in seconds for each in seconds[name])
