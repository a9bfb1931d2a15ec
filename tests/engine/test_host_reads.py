"""Models are read into the host's memory beside loads, and copied to the device from there."""

import gc
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import Preset
from darkroom_server.core.events import Event, JobFinished
from darkroom_server.core.model_events import ModelInHost, ModelLoad, ModelLoaded, ModelNotLoaded
from darkroom_server.engine.catalogue import global_settings, loader
from darkroom_server.engine.catalogue.global_settings import LoopPaused, exclusive_settings
from darkroom_server.engine.loading import pipeline, read_model
from darkroom_server.ipc.commands import LoadModel

from .conftest import make_job
from .fake_cuda import FakeDevice
from .test_weight_store import (
    UNET,
    Catalogue,
    OnDevice,
    check_return,
    copy_of,
    on_this_thread,
)

__all__ = ["on_this_thread"]


class Reading(Catalogue):
    """A loop that reads models into the host's memory too."""

    def begin_read(self, id: str) -> None:
        self.loop.loop.change_models(LoadModel(self.sources[id], keep=True, host_only=True))

    def read(self, id: str) -> Any:
        before = len(self._events(ModelInHost, ModelNotLoaded))
        self.begin_read(id)
        self.loop.wait_for(lambda: len(self._events(ModelInHost, ModelNotLoaded)) > before)
        return self._events(ModelInHost, ModelNotLoaded)[-1]

    def read_of(self, id: str) -> ModelLoad:
        read = self.read(id)
        assert isinstance(read, ModelInHost), read
        return read.load

    @property
    def store(self) -> Any:
        resident = self.loop.loop._resident
        assert resident is not None
        return resident.loader.store


@contextmanager
def reading(**folders: Path) -> Iterator[Reading]:
    made = Reading(**folders)
    try:
        yield made
    finally:
        made.loop.close()


def test_a_model_that_was_read_is_loaded_without_its_files(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(tiny=tiny_folder) as models:
        direct = models.load_of("tiny")
        picture = models.picture("tiny")
        models.unload("tiny", keep=False)
        read = models.read_of("tiny")
        assert read.origin is WeightOrigin.DISK
        assert read.host_bytes == read.weight_bytes == direct.weight_bytes
        assert read.shared == direct.shared
        with monkeypatch.context() as patch:
            patch.delattr(read_model, "load_pipeline")
            loaded = models.load_of("tiny")
        assert loaded.origin is WeightOrigin.HOST
        assert loaded.weight_bytes == direct.weight_bytes
        assert models.picture("tiny") == picture


def test_one_model_is_read_while_another_is_loaded_and_a_job_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"tiny": tiny_folder}
    for name in ("fine", "other"):
        folders[name] = copy_of(tiny_folder, tmp_path / name, UNET)
    load_pipeline = pipeline.load_pipeline
    held = threading.Event()
    began = threading.Event()

    def slowly(files: Any, *rest: Any) -> Any:
        if files.source.id == "other":
            began.set()
            assert held.wait(60)
        return load_pipeline(files, *rest)

    with reading(**folders) as models:
        models.load_of("other")
        expected = models.picture("other")
        models.unload("other", keep=False)
        models.load_of("tiny")
        models.read_of("fine")
        monkeypatch.setattr(read_model, "load_pipeline", slowly)
        models.begin_read("other")
        assert began.wait(60)
        assert models.load_of("fine").origin is WeightOrigin.HOST
        assert models.picture("tiny") != models.picture("fine")
        assert [each.load.model for each in models._events(ModelInHost)] == ["fine"], "it goes on"
        held.set()
        models.loop.wait_for(lambda: len(models._events(ModelInHost)) == 2)
        assert models.load_of("other").origin is WeightOrigin.HOST
        assert models.picture("other") == expected


def test_a_read_that_fails_is_the_models_fault_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = copy_of(tiny_folder, tmp_path / "short")
    (short / UNET).write_bytes((short / UNET).read_bytes()[:1000])
    gone = copy_of(tiny_folder, tmp_path / "gone")
    load_pipeline = pipeline.load_pipeline

    def delete_and_load(files: Any, *rest: Any) -> Any:
        if files.source.id == "gone":
            shutil.rmtree(gone)
        return load_pipeline(files, *rest)

    monkeypatch.setattr(read_model, "load_pipeline", delete_and_load)
    with reading(tiny=tiny_folder, short=short, gone=gone) as models:
        models.load_of("tiny")
        picture = models.picture("tiny")
        for id in ("short", "gone"):
            failed = models.read(id)
            assert isinstance(failed, ModelNotLoaded)
            assert failed.model == id
            assert not failed.out_of_memory
            assert not models.store._being_read
            assert id not in models.store._on_host
        assert models.picture("tiny") == picture
        assert models.read_of("tiny").host_bytes, "reads go on"


def test_too_little_memory_of_the_host_is_reported_as_such(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(tiny=tiny_folder) as models:
        with monkeypatch.context() as patch:
            patch.setattr(read_model, "available_bytes", lambda _: 1000)
            failed = models.read("tiny")
        assert isinstance(failed, ModelNotLoaded)
        assert failed.out_of_memory
        assert "the host's memory" in failed.reason
        assert models.read_of("tiny").host_bytes


def test_a_model_that_a_quantiser_packs_is_not_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(tiny=tiny_folder) as models:
        monkeypatch.setattr(read_model, "quantization_of", lambda _: "int8")
        monkeypatch.delattr(read_model, "load_pipeline")
        read = models.read_of("tiny")
        assert (read.host_bytes, read.weight_bytes) == (0, 0)


def test_files_that_changed_after_the_read_are_read_again(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_folder, tmp_path / "changing")
    with reading(changing=folder) as models:
        models.read_of("changing")
        other = copy_of(tiny_folder, tmp_path / "other", UNET)
        shutil.copyfile(other / UNET, folder / UNET)
        assert models.load_of("changing").origin is WeightOrigin.DISK


def test_equal_parts_are_in_the_hosts_memory_once(tiny_folder: Path, tmp_path: Path) -> None:
    fine = copy_of(tiny_folder, tmp_path / "fine", UNET)
    with reading(tiny=tiny_folder, fine=fine) as models:
        for id in ("tiny", "fine"):
            models.read_of(id)
        tiny, tuned = (models.store._on_host[id].parts for id in ("tiny", "fine"))
        assert tiny["vae"] is tuned["vae"]
        assert tiny["text_encoder"] is tuned["text_encoder"]
        assert tiny["unet"] is not tuned["unet"], "the negative control"
        models.unload("tiny", keep=False)
        assert tuned["vae"].host_weights is not None
        assert tiny["unet"].host_weights is None
        models.load_of("fine")
        (end,) = models.loop.run(make_job("last", model="fine", steps=2)).values()
        assert isinstance(end, JobFinished)


def test_threads_switch_often_until_the_last_read_has_ended() -> None:
    usual = sys.getswitchinterval()
    with loader._short_switches:
        with loader._short_switches:
            assert sys.getswitchinterval() == pytest.approx(loader.SWITCH_SECONDS)
        assert sys.getswitchinterval() == pytest.approx(loader.SWITCH_SECONDS)
    assert sys.getswitchinterval() == pytest.approx(usual)


def test_two_reads_do_not_change_the_default_dtype_at_once() -> None:
    asked: list[LoopPaused] = []
    inside, go_on, second_asks = threading.Event(), threading.Event(), threading.Event()

    def grant(pause: LoopPaused) -> None:
        asked.append(pause)
        pause.granted.set()

    def first() -> None:
        with exclusive_settings(grant):
            torch.set_default_dtype(torch.float64)
            inside.set()
            assert go_on.wait(60)
            torch.set_default_dtype(torch.float32)

    def second() -> None:
        with exclusive_settings(grant):
            second_asks.set()
            torch.set_default_dtype(torch.float16)
            torch.set_default_dtype(torch.float32)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert second_asks.wait(60)
    assert torch.get_default_dtype() is torch.float64
    assert len(asked) == 1
    assert global_settings._alone.locked()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(asked) == 2
    assert all(pause.over.is_set() for pause in asked)
    assert torch.get_default_dtype() is torch.float32
    assert not global_settings._alone.locked()


# ---- on a device with memory of its own ----


class ReadOnDevice(OnDevice):
    """Reads on the make-believe CUDA device's host."""

    def read(self, id: str) -> Event:
        self.resident.handle(LoadModel(self.sources[id], keep=True, host_only=True))
        self.resident.settle()
        while not self.loop._inbox.empty():
            change: Any = self.loop._inbox.get()
            self.resident.handle(change)
        return next(e for e in reversed(self.events) if isinstance(e, ModelInHost | ModelNotLoaded))


@pytest.mark.usefixtures("on_this_thread")
@pytest.mark.parametrize("preset", [Preset.FAST, Preset.TINY])
def test_a_read_takes_no_memory_of_the_device(
    preset: Preset, tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    fine = copy_of(tiny_folder, tmp_path / "fine", UNET)
    models = ReadOnDevice(cuda, preset, tiny=tiny_folder, fine=fine)
    tiny = models.load("tiny", keep=False)
    gc.collect()  # What the load left in cycles would go at some time.
    before, peak = cuda.live_bytes, cuda.peak_bytes
    read = models.read("fine")
    assert isinstance(read, ModelInHost)
    assert read.load.host_bytes == tiny.weight_bytes
    assert cuda.live_bytes == before
    assert cuda.peak_bytes == peak
    loaded = models.load("fine", keep=True)
    assert loaded.origin is WeightOrigin.HOST
    assert loaded.host_bytes == read.load.host_bytes
    unet = tiny.bytes_by_component["unet"]
    assert cuda.live_bytes - before >= unet, "the negative control"
    assert any(isinstance(event, ModelLoaded) for event in models.events)


@pytest.mark.usefixtures("on_this_thread")
def test_a_model_that_cannot_be_pinned_is_loaded_from_its_files(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    models = ReadOnDevice(cuda, Preset.FAST, tiny=tiny_folder)
    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    read = models.read("tiny")
    assert isinstance(read, ModelInHost)
    assert read.load.host_bytes == 0
    assert models.load("tiny", keep=False).origin is WeightOrigin.DISK


# ---- on a GPU ----


class OnGpu(Catalogue):
    fields: ClassVar[dict[str, Any]] = {"device": "cuda", "preset": Preset.FAST}


@pytest.mark.gpu
def test_a_model_comes_back_to_a_gpu(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = OnGpu(tiny=tiny_folder)
    try:
        assert check_return(models, monkeypatch).host_bytes > 0
    finally:
        models.loop.close()
