"""The engines that the benchmark of LoRA rows compares."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from bench.engine.loras import NAMES, ClosedLoop, job_with, write_adapters
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from tests.engine.tiny import write_tiny_model


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", NAMES)
def test_each_engine_serves_and_batches_as_its_name_says(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    sources = write_adapters(tmp_path, pipeline, 2)
    models = (ModelSource(id="tiny", location=str(folder)),)
    engine = ClosedLoop(EngineConfig(models=models, rows=8, adapters=tuple(sources)), name)
    try:
        jobs = [replace(job_with(engine.info, i, 2), steps=4) for i in range(4)]
        assert engine.images_per_second(jobs) > 0
        assert (engine.most_adapters() > 1) is (name == "mixed")
    finally:
        engine.close()
