"""Events about the engine itself: loads, counts, peaks, memory."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import structlog
import torch

from darkroom_server.core.events import (
    BatchDone,
    Counted,
    EngineCounts,
    Event,
    MemoryReport,
    PeakMeasured,
    Sensors,
    StageSeconds,
)
from darkroom_server.engine.batching.resident_job import ResidentJob
from darkroom_server.engine.device.gpu_sensors import GpuSensors
from darkroom_server.engine.device.memory_reporter import MemoryReporter
from darkroom_server.engine.device.peak_memory import PeakMemoryTracker
from darkroom_server.engine.device.timer import Timer
from darkroom_server.engine.families.stable_diffusion import StableDiffusionModel
from darkroom_server.engine.loading.startup import start_loop

from .conftest import LoopUnderTest, config_for, make_job

CPU = torch.device("cpu")
MIB = 1 << 20


def counted(loop: LoopUnderTest) -> dict[Counted, int]:
    totals: dict[Counted, int] = {}
    for event in loop.events:
        if isinstance(event, EngineCounts):
            assert event.model == "tiny"
            for what, amount in event.counts.items():
                totals[what] = totals.get(what, 0) + amount
    return totals


def test_batches_count_samples_and_those_that_joined(own_loop: LoopUnderTest) -> None:
    own_loop.row_limits.max_rows = 16
    own_loop.run(make_job("a", image_count=2, steps=3))
    batches = [event for event in own_loop.events if isinstance(event, BatchDone)]
    assert [(b.samples, b.rows, b.max_rows) for b in batches] == [(2, 4, 16)] * 3
    assert sum(b.joined for b in batches) == 0

    def join(event: Event) -> None:
        if isinstance(event, BatchDone) and event.samples == 1:
            own_loop.on_event = lambda _: None
            own_loop.loop.submit(make_job("c", steps=3))

    own_loop.on_event = join
    own_loop.run(make_job("b", steps=30))
    own_loop.wait_for(lambda: "c" in own_loop.ends)
    assert sum(e.joined for e in own_loop.events if isinstance(e, BatchDone)) == 1


def test_prompts_are_counted(own_loop: LoopUnderTest) -> None:
    own_loop.run(make_job("a"), make_job("b", prompt="star " * 500))
    own_loop.run(make_job("c"))
    own_loop.wait_for(lambda: Counted.PROMPTS_CACHED in counted(own_loop))
    totals = counted(own_loop)
    assert totals[Counted.PROMPTS_ENCODED] == 3  # Two prompts, and the empty negative one.
    assert totals[Counted.PROMPTS_TRUNCATED] == 1


def test_out_of_memory_is_counted(own_loop: LoopUnderTest) -> None:
    model = own_loop.models["tiny"]
    unet = model.unet

    def narrow(sample: torch.Tensor, **options: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError
        return unet(sample, **options)

    model.unet = narrow
    own_loop.row_limits.max_rows = 16
    own_loop.run(make_job("a", image_count=2, steps=1))
    own_loop.wait_for(lambda: Counted.OUT_OF_MEMORY_SPLIT in counted(own_loop))
    assert counted(own_loop)[Counted.OUT_OF_MEMORY_SPLIT] == 1
    assert Counted.OUT_OF_MEMORY_FAILED not in counted(own_loop)


def test_loads_are_reported(tiny_folder: Path) -> None:
    loop, ready = start_loop(config_for(tiny_folder), lambda _: None)
    (load,) = ready.loads
    assert load.model == "tiny"
    assert 0 < load.load_seconds + load.warm_up_seconds <= ready.load_seconds
    unet = cast(StableDiffusionModel, loop._runner.models["tiny"]).unet
    assert load.bytes_by_component["unet"] == sum(p.numel() * 4 for p in unet.parameters())
    assert set(load.bytes_by_component) == {"unet", "vae", "text_encoder"}
    loop.close()
    loop.run()


def test_peaks_are_measured_once_for_each_class_of_work() -> None:
    emitted: list[Event] = []
    watch = PeakMemoryTracker(emitted.append)
    with watch.watch(CPU, "tiny", 64, 64, rows=3):
        torch.ones(64 * MIB, dtype=torch.uint8)
    with watch.watch(CPU, "tiny", 60, 64, rows=4):  # Of the same class, a moment later.
        torch.ones(128 * MIB, dtype=torch.uint8)
    with pytest.raises(ValueError, match="boom"), watch.watch(CPU, "tiny", 64, 64):
        raise ValueError("boom")
    with watch.watch(CPU, "tiny", 512, 512):
        torch.ones(32 * MIB, dtype=torch.uint8)
    batch, decode = emitted
    assert isinstance(batch, PeakMeasured)
    assert isinstance(decode, PeakMeasured)
    assert batch.peak_bytes == pytest.approx(64 * MIB, rel=0.2)
    assert (decode.width, decode.rows) == (512, 0)
    assert decode.peak_bytes == pytest.approx(32 * MIB, rel=0.2)
    assert watch.highest > batch.peak_bytes


def test_a_sandbox_without_peaks_emits_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", deny)
    emitted: list[Event] = []
    watch = PeakMemoryTracker(emitted.append)
    for rows in (0, 1, 2):
        with watch.watch(CPU, "tiny", 64, 64, rows=rows):
            pass
    assert emitted == []


def test_memory_on_a_cpu_is_that_of_the_process() -> None:
    emitted: list[Event] = []
    reporter = MemoryReporter([CPU], PeakMemoryTracker(emitted.append), emitted.append)
    ballast = torch.ones(64 * MIB, dtype=torch.uint8)
    reporter.report()
    (report,) = emitted
    assert isinstance(report, MemoryReport)
    assert report.device == "cpu"
    assert report.sensors == Sensors()
    own = psutil.Process().memory_info().rss
    assert report.host_rss == pytest.approx(own, rel=0.1)
    assert report.by_kind["allocated"] == pytest.approx(own, rel=0.1)
    assert report.by_kind["peak"] >= report.by_kind["allocated"] * 0.9
    assert report.by_kind["device_total"] == psutil.virtual_memory().total
    assert 0 < report.by_kind["device_used"] < report.by_kind["device_total"]
    assert len(ballast) == 64 * MIB


def test_the_engine_reports_memory_while_it_is_idle(own_loop: LoopUnderTest) -> None:
    own_loop.wait_for(lambda: sum(isinstance(e, MemoryReport) for e in own_loop.events) >= 2)


class FakeNvml:
    """NVML as ``nvidia-ml-py`` offers it, with one GPU and its sensors."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True, power: bool = True) -> None:
        self._driver = driver
        self._power = power

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=40, memory=10)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self._power:
            raise self.NVMLError("Not Supported")
        return 312_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3, total=8)


def test_nvml_is_read_by_uuid_and_in_base_units() -> None:
    sensors = GpuSensors("1234", FakeNvml())
    assert sensors.read() == Sensors(utilisation=0.4, power_watts=312.5, temperature_celsius=61.0)
    assert sensors.memory() == (3, 8)


def test_a_gpu_that_lacks_a_sensor() -> None:
    emitted = GpuSensors("GPU-1234", FakeNvml(power=False)).read()
    assert emitted == Sensors(utilisation=0.4, power_watts=None, temperature_celsius=61.0)


def test_a_machine_without_the_driver_has_no_sensors() -> None:
    sensors = GpuSensors("1234", FakeNvml(driver=False))
    assert sensors.read() == Sensors()
    assert sensors.memory() is None


def test_the_stages_add_up_if_the_device_encodes_while_the_batch_is_launched() -> None:
    emitted: list[Event] = []
    resident = ResidentJob(make_job("a", submitted_at=100.0), emitted.append)
    # Launched in 1 s, done after 3: the first batch was launched in between.
    watch = cast(Timer, SimpleNamespace(began=101.0, seconds=lambda: 3.0))
    resident.prompt_encoded([], watch)
    resident.begin_batch(102.0)
    resident.denoised(110.0)
    resident.decoded(111.0)
    stages = resident._stages(111.5)
    assert stages == StageSeconds(
        queue=1.0, encode_prompt=3.0, denoise=6.0, decode=1.0, encode_image=0.5
    )


def test_a_timer_on_a_cpu_is_a_clock() -> None:
    with Timer(CPU) as watch:
        began = time.monotonic()
        while time.monotonic() < began + 0.01:
            pass
    assert watch.began <= began
    assert 0.01 <= watch.seconds() <= time.monotonic() - watch.began


@pytest.mark.gpu
def test_a_timer_on_a_gpu_counts_launched_work() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    with Timer(device) as watch:
        for _ in range(20):
            matrix = matrix @ matrix
    launched = time.monotonic() - watch.began
    torch.cuda.synchronize()
    assert watch.seconds() > launched
    assert watch.seconds() <= time.monotonic() - watch.began


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_torch_says() -> None:
    device = torch.device("cuda", 0)
    emitted: list[Event] = []
    watch = PeakMemoryTracker(emitted.append)
    ballast = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    with watch.watch(device, "tiny", 64, 64, rows=2):
        torch.ones(32 * MIB, dtype=torch.uint8, device=device)
    (peak,) = emitted
    assert isinstance(peak, PeakMeasured)
    assert peak.peak_bytes == 32 * MIB
    MemoryReporter([device], watch, emitted.append).report()
    report = emitted[-1]
    assert isinstance(report, MemoryReport)
    assert report.by_kind["allocated"] == torch.cuda.memory_allocated(device)
    assert report.by_kind["reserved"] == torch.cuda.memory_reserved(device)
    assert report.by_kind["peak"] >= len(ballast) + 32 * MIB
    assert 0 < report.by_kind["device_used"] <= report.by_kind["device_total"]


def test_lines_about_an_image_name_its_request(own_loop: LoopUnderTest) -> None:
    def break_down(*_: object) -> None:
        raise ValueError("no such latents")

    own_loop.models["tiny"].decoder._decode = break_down  # type: ignore[assignment]
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as logs:
        own_loop.run(make_job("mine#1", request_id="mine", trace_id="4bf9", steps=1))
    (line,) = [line for line in logs if line["event"] == "decode failed"]
    assert (line["job"], line["request_id"], line["trace_id"]) == ("mine#1", "mine", "4bf9")
