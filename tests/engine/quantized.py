"""Pictures of models whose weights are stored in fewer bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.events import JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.quantization import Quantization, Quantize
from darkroom_server.engine.loading.startup import start_loop

from .conftest import LoopUnderTest, config_for, make_job

JOB: dict[str, Any] = {"steps": 3, "exact": True, "scheduler": SchedulerName.MODEL}


def source(folder: Path, kind: Quantization | None = None, file: Path | None = None) -> ModelSource:
    quantize = Quantize(kind, str(file) if file else None) if kind is not None else None
    return ModelSource(id="tiny", location=str(folder), quantize=quantize)


@contextmanager
def loop(model: ModelSource, **fields: Any) -> Iterator[LoopUnderTest]:
    made = LoopUnderTest(config_for(Path(model.location), models=(model,), **fields))
    try:
        yield made
    finally:
        made.close()


def picture(model: ModelSource, **fields: Any) -> bytes:
    with loop(model, **fields) as made:
        return picture_of(made)


def picture_of(made: LoopUnderTest) -> bytes:
    (end,) = made.run(make_job("one", **JOB)).values()
    assert isinstance(end, JobFinished), end
    return made.image("one").image.data


def difference(one: bytes, other: bytes) -> float:
    """The mean absolute difference of two pictures, in levels of 256."""
    pair = [np.frombuffer(each, np.uint8).astype(float) for each in (one, other)]
    return float(np.abs(pair[0] - pair[1]).mean())


def loaded_bytes(model: ModelSource) -> dict[str, int]:
    """The bytes of each component in memory."""
    config = config_for(Path(model.location), models=(model,))
    _, ready = start_loop(config, lambda _: None)
    return ready.loads[0].bytes_by_component
