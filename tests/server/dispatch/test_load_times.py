"""How long a load takes: remembered on disk, and sent with MODEL_LOADING."""

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from darkroom_server.app import Server
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.dispatch import LoadTimes
from darkroom_server.settings import Engine, Network, Settings
from darkroom_server.settings.sources import load_times_file
from tests.server.wire import SERVING, Wire, refusal


def remember(file: Path, seconds: float) -> None:
    file.write_text(json.dumps({"demo": seconds, "other": 5.0}))


def test_a_load_is_remembered_for_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "new" / "load-times.json"
    first = LoadTimes(file, "demo")
    assert (first.expected, first.remaining) == (None, None)
    first.begin()
    first.record()
    LoadTimes(file, "other").record()

    second = LoadTimes(file, "demo")

    assert second.expected is not None
    assert 0 <= second.expected < 60
    assert set(json.loads(file.read_text())) == {"demo", "other"}


@pytest.mark.parametrize("text", ["", "[1]", '{"demo": "soon"}', '{"demo": -1}', "[" * 100_000])
def test_a_broken_file_is_ignored(tmp_path: Path, text: str) -> None:
    file = tmp_path / "load-times.json"
    file.write_text(text)

    times = LoadTimes(file, "demo")

    assert times.expected is None
    times.record()
    assert json.loads(file.read_text()).keys() == {"demo"}


def test_a_folder_that_cannot_be_written_does_not_end_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    LoadTimes(tmp_path / "file" / "load-times.json", "demo").record()


def test_the_file_and_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, key = load_times_file(Settings())
    other = load_times_file(Settings(engine=Engine(device="cuda:1")))

    assert file == tmp_path / "darkroom" / "measurements" / "load-times.json"
    assert key != other[1]
    assert load_times_file(Settings(engine=Engine(measurement_cache=False)))[0] is None


@pytest.mark.parametrize(
    ("last", "retry"), [(20.0, (15.0, 20.0)), (1000.0, (30.0, 30.0)), (0.001, (2.0, 2.0))]
)
async def test_a_loading_server_says_how_long_a_load_takes(
    tmp_path: Path, last: float, retry: tuple[float, float]
) -> None:
    file = tmp_path / "load-times.json"
    remember(file, last)
    settings = Settings(network=Network(port=0, metrics_port=0))
    engine = FakeEngine(load=False)
    server = Server(settings, [engine], load_times=LoadTimes(file, "demo"))
    await server.startup()
    serve = asyncio.create_task(server.serve())
    async with grpc.aio.insecure_channel(server.address) as channel:
        queue: asyncio.Queue[object] = asyncio.Queue()
        wire = Wire(server, engine, queue, queue, channel, serve)  # type: ignore[arg-type]
        error = await refusal(wire.generate())
        engine.become_ready()
        await wire.health_becomes(SERVING)
    server.stop()
    await serve
    await server.shutdown()

    assert error.info.reason == "MODEL_LOADING"
    assert float(error.info.metadata["load_seconds"]) == last
    assert float(error.info.metadata["elapsed_seconds"]) >= 0
    delay = error.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() / 1000
    assert retry[0] <= delay <= retry[1]
    # The next start knows this load.
    assert LoadTimes(file, "demo").expected not in (None, last)
    assert LoadTimes(file, "other").expected == 5.0
