"""Measurements are remembered on disk; nothing about the disk stops a start."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from darkroom_server.core.engine_config import Dtype
from darkroom_server.core.model_runtime import RowLimitSource
from darkroom_server.engine.warmup import measurement
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache, Measurements

from .conftest import LoopUnderTest, config_for, make_job
from .tiny import write_tiny_model

FOUND = Measurements(
    max_rows=8,
    passes=((2, 0.01), (4, 0.012), (8, 0.015)),
    decode=0.03,
    encode=0.02,
    bytes_per_row=1000,
    bytes_per_pass=0,
    bytes_per_decode=2000,
)
KEY = {"device": "cpu", "format": "float32"}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = str(tmp_path / "new" / "folder")
    cache = MeasurementCache(folder, KEY)
    assert cache.load() is None
    cache.save(FOUND)
    assert MeasurementCache(folder, KEY).load() == FOUND
    assert MeasurementCache(folder, {**KEY, "format": "bfloat16"}).load() is None
    cache.save_row_limit(16)
    assert MeasurementCache(folder, KEY).load() == dataclasses.replace(FOUND, max_rows=16)
    assert [file.suffix for file in Path(folder).iterdir()] == [".json"]


def test_without_a_folder_nothing_is_written() -> None:
    cache = MeasurementCache(None, KEY)
    cache.save(FOUND)
    assert cache.load() is None


def broken(data: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({**data, "measurements": {**data["measurements"], **fields}}).encode()


DAMAGED: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda data: b"",
    "binary": lambda data: b"\x80\x81",
    "nested": lambda data: b"[" * 50_000,
    "large": lambda data: b"x" * 100_000,
    "a list": lambda data: b"[]",
    "of another key": lambda data: json.dumps({**data, "key": "0" * 64}).encode(),
    "no measurements": lambda data: json.dumps({"key": data["key"]}).encode(),
    "an unknown field": lambda data: broken(data, extra=1),
    "one row": lambda data: broken(data, max_rows=1),
    "true rows": lambda data: broken(data, max_rows=True),
    "a billion rows": lambda data: broken(data, max_rows=10**9),
    "an encode of no time": lambda data: broken(data, encode=-1.0),
    "not a number": lambda data: broken(data, decode=float("nan")),
    "a negative time": lambda data: broken(data, passes=[[2, -1.0]]),
    "half rows": lambda data: broken(data, passes=[[2.5, 1.0]]),
    "passes by name": lambda data: broken(data, passes={"2": 1.0}),
    "negative bytes": lambda data: broken(data, bytes_per_row=-1),
    "bytes as text": lambda data: broken(data, bytes_per_row="1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_broken_or_foreign_file_is_ignored_and_logged(tmp_path: Path, name: str) -> None:
    cache = MeasurementCache(str(tmp_path), KEY)
    cache.save(FOUND)
    (file,) = tmp_path.iterdir()
    file.write_bytes(DAMAGED[name](json.loads(file.read_bytes())))
    with structlog.testing.capture_logs() as logs:
        assert cache.load() is None
    assert [log["event"] for log in logs] == ["measurement cache ignored"]
    cache.save(FOUND)
    assert MeasurementCache(str(tmp_path), KEY).load() == FOUND


def test_a_folder_that_cannot_be_used_does_not_stop_the_start(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache = MeasurementCache(str(blocked), KEY)
    with structlog.testing.capture_logs() as logs:
        assert cache.load() is None
        cache.save(FOUND)
    assert {log["event"] for log in logs} == {
        "measurement cache ignored",
        "measurements not remembered",
    }


def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = MeasurementCache(str(tmp_path), KEY)
    cache.save(FOUND)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    cache.save_row_limit(64)
    monkeypatch.undo()
    assert MeasurementCache(str(tmp_path), KEY).load() == FOUND
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file remains"


SAVE_MANY = """
import json, sys
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache, Measurements

folder, key, fields = sys.argv[1], *map(json.loads, sys.argv[2:])
for _ in range(200):
    MeasurementCache(folder, key).save(Measurements(**fields))
"""


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    MeasurementCache(str(tmp_path), KEY).save(FOUND)
    writers = []
    for rows in (16, 32):
        fields = dataclasses.asdict(dataclasses.replace(FOUND, max_rows=rows))
        command = [sys.executable, "-c", SAVE_MANY, str(tmp_path), *map(json.dumps, (KEY, fields))]
        writers.append(subprocess.Popen(command))
    while any(writer.poll() is None for writer in writers):
        assert MeasurementCache(str(tmp_path), KEY).load() is not None
    assert [writer.returncode for writer in writers] == [0, 0]


def test_the_second_start_measures_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    config = config_for(tiny_folder, rows=None, max_rows=8, measurement_cache=str(cache))
    first, data = started(config)
    assert first.limits.row_limit_source is RowLimitSource.MEASURED
    monkeypatch.setattr(measurement, "_measure_now", _never)
    second, again = started(config)
    assert second.limits.row_limit_source is RowLimitSource.REMEMBERED
    assert second.limits.max_rows == first.limits.max_rows
    assert second.speed == first.speed
    assert again == data, "an exact image"
    with pytest.raises(AssertionError, match="measured again"):
        started(dataclasses.replace(config, dtype=Dtype.BFLOAT16))
    with pytest.raises(AssertionError, match="measured again"):
        started(dataclasses.replace(config, measurement_cache=None))
    with pytest.raises(AssertionError, match="measured again"):
        started(dataclasses.replace(config, threads=2))


@pytest.mark.parametrize(("seconds", "remembered"), [(3.008, False), (1.9, True)])
def test_batches_of_seconds_are_not_remembered(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    remembered: bool,
) -> None:
    slow = dataclasses.replace(FOUND, max_rows=2, passes=((2, seconds),))
    monkeypatch.setattr(measurement, "_measure_now", lambda *_: slow)
    config = config_for(tiny_folder, rows=None, max_rows=8, measurement_cache=str(tmp_path))
    first, _ = started(config)
    assert first.limits.row_limit_source is RowLimitSource.MEASURED
    second, _ = started(config)
    expected = RowLimitSource.REMEMBERED if remembered else RowLimitSource.MEASURED
    assert second.limits.row_limit_source is expected


def test_fine_tunes_share_measurements(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key has the components' configurations and not their weights."""
    from safetensors.torch import load_file, save_file

    cache = str(tmp_path / "cache")
    started(config_for(tiny_folder, rows=2, measurement_cache=cache))
    tuned = write_tiny_model(tmp_path / "tuned")
    file = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file)
    monkeypatch.setattr(measurement, "_measure_now", _never)
    info, _ = started(config_for(tuned, rows=2, measurement_cache=cache))
    assert info.limits.row_limit_source is RowLimitSource.SET
    other = write_tiny_model(tmp_path / "other")
    config = other / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    with pytest.raises(AssertionError, match="measured again"):
        started(config_for(other, rows=2, measurement_cache=cache))


def test_a_corrected_limit_is_remembered(tiny_folder: Path, tmp_path: Path) -> None:
    config = config_for(tiny_folder, rows=None, max_rows=8, measurement_cache=str(tmp_path))
    loop = LoopUnderTest(config)
    try:
        loop.loop._caches["tiny"].save_row_limit(4)
    finally:
        loop.close()
    assert started(config)[0].limits.max_rows == 4


def started(config: Any) -> tuple[Any, bytes]:
    loop = LoopUnderTest(config)
    try:
        loop.run(make_job("exact", exact=True))
        return loop.models["tiny"].info, loop.image("exact").image.data
    finally:
        loop.close()


def _never(*_: object) -> None:
    raise AssertionError("measured again")
