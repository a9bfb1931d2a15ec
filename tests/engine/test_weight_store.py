"""What an engine holds: models in the host's memory come back, and equal parts are there once."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch

from darkroom_server.core.catalog import WeightOrigin
from darkroom_server.core.engine_config import EngineConfig, ModelSource, Preset
from darkroom_server.core.events import Event, JobFinished
from darkroom_server.core.model_events import (
    ModelLoad,
    ModelLoaded,
    ModelNotLoaded,
    ModelUnloaded,
)
from darkroom_server.dispatch.models.residency import held_bytes
from darkroom_server.engine.catalogue import loader
from darkroom_server.engine.loading import read_model
from darkroom_server.engine.loading.pipeline import ModelFiles, load_pipeline
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.weights.parts import weights_in
from darkroom_server.ipc.commands import LoadModel, UnloadModel

from .conftest import MEASUREMENTS, LoopUnderTest, config_for, make_job
from .fake_cuda import FakeDevice
from .folders import edit_index, save_elsewhere

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
TEXT_ENCODER = Path("text_encoder") / "model.safetensors"


def perturb(file: Path) -> None:
    """Write other weights of the same shapes into ``file``."""
    weights = safetensors.torch.load_file(file)
    changed = {k: w * 1.2 if w.is_floating_point() else w for k, w in weights.items()}
    safetensors.torch.save_file(changed, file, {"format": "pt"})


def copy_of(tiny: Path, folder: Path, *changed: Path) -> Path:
    """A copy of the tiny model, with other weights in the files ``changed``."""
    copied = Path(shutil.copytree(tiny, folder))
    for file in changed:
        perturb(copied / file)
    return copied


def sources(**folders: Path) -> tuple[ModelSource, ...]:
    return tuple(ModelSource(id=id, location=str(path)) for id, path in folders.items())


def weights_of(module: Any) -> set[int]:
    return {each.data_ptr() for each in module.parameters()}


# ---- the host's memory ----


class Catalogue:
    """A loop that loads and unloads models on command; ``fields`` are of its configuration."""

    fields: ClassVar[dict[str, Any]] = {}

    def __init__(self, **folders: Path) -> None:
        self.sources = {source.id: source for source in sources(**folders)}
        anywhere = next(iter(folders.values()))
        every = tuple(self.sources.values())
        config = config_for(anywhere, models=(), catalogue=every, **self.fields)
        self.loop = LoopUnderTest(config)
        self._images = 0

    def _events(self, *kinds: type[Any]) -> list[Any]:
        return [event for event in self.loop.events if isinstance(event, kinds)]

    def load(self, id: str) -> Any:
        before = len(self._events(ModelLoaded, ModelNotLoaded))
        self.loop.loop.change_models(LoadModel(self.sources[id], keep=True))
        self.loop.wait_for(lambda: len(self._events(ModelLoaded, ModelNotLoaded)) > before)
        return self._events(ModelLoaded, ModelNotLoaded)[-1]

    def load_of(self, id: str) -> ModelLoad:
        loaded = self.load(id)
        assert isinstance(loaded, ModelLoaded), loaded
        return loaded.load

    def unload(self, id: str, *, keep: bool) -> int:
        before = len(self._events(ModelUnloaded))
        self.loop.loop.change_models(UnloadModel(id, keep))
        self.loop.wait_for(lambda: len(self._events(ModelUnloaded)) > before)
        return int(self._events(ModelUnloaded)[-1].host_bytes)

    @property
    def live_bytes(self) -> int:
        """What the weights of all models take, of which tensors that are one count once."""
        resident = self.loop.loop._resident
        assert resident is not None
        modules = (each for held in resident.loader._modules.values() for each in held)
        weights = (weight for module in modules for weight in weights_in(module))
        return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())

    def picture(self, id: str) -> bytes:
        self._images += 1
        job = make_job(f"{id}-{self._images}", model=id, steps=2, exact=True)
        (end,) = self.loop.run(job).values()
        assert isinstance(end, JobFinished)
        return self.loop.image(job.id).image.data


@contextmanager
def catalogue(**folders: Path) -> Iterator[Catalogue]:
    made = Catalogue(**folders)
    try:
        yield made
    finally:
        made.loop.close()


def check_return(models: Catalogue, monkeypatch: pytest.MonkeyPatch) -> ModelLoad:
    """A model is loaded, evicted to the host's memory, and loaded from there; the first load."""
    first = models.load_of("tiny")
    assert first.origin is WeightOrigin.DISK
    picture = models.picture("tiny")
    kept = models.unload("tiny", keep=True)
    assert kept > 0
    with monkeypatch.context() as patch:
        patch.delattr(read_model, "load_pipeline")
        again = models.load_of("tiny")
    assert again.origin is WeightOrigin.HOST
    assert again.weight_bytes == first.weight_bytes
    assert models.picture("tiny") == picture
    assert models.unload("tiny", keep=True) == kept
    assert models.unload("tiny", keep=False) == 0
    assert models.load_of("tiny").origin is WeightOrigin.DISK
    assert models.picture("tiny") == picture
    assert models.unload("tiny", keep=False) == 0
    assert models.load_of("tiny").origin is WeightOrigin.DISK
    return first


def test_a_model_comes_back_from_the_hosts_memory(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with catalogue(tiny=tiny_folder) as models:
        first = check_return(models, monkeypatch)
        assert first.host_bytes == 0, "it is the device's own"
        assert models.unload("tiny", keep=True) == first.weight_bytes


def test_files_that_changed_are_read_again(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path / "changing")
    with catalogue(changing=folder) as models:
        models.load("changing")
        before = models.picture("changing")
        models.unload("changing", keep=True)
        perturb(folder / UNET)
        again = models.load("changing")
        assert again.load.origin is WeightOrigin.DISK
        assert models.picture("changing") != before
        models.unload("changing", keep=True)
        shutil.rmtree(folder)
        assert isinstance(models.load("changing"), ModelNotLoaded)


def test_a_failed_load_frees_what_it_took(tiny_folder: Path, tmp_path: Path) -> None:
    broken = copy_of(tiny_folder, tmp_path / "broken")
    (broken / UNET).write_bytes((broken / UNET).read_bytes()[:1000])
    with catalogue(tiny=tiny_folder, broken=broken) as models:
        models.load_of("tiny")
        picture = models.picture("tiny")
        assert isinstance(models.load("broken"), ModelNotLoaded)
        assert models.picture("tiny") == picture
        store = models.loop.loop._resident
        assert store is not None
        assert not store.loader.store._being_read


def test_a_folder_that_is_deleted_while_it_is_read_fails_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = copy_of(tiny_folder, tmp_path / "gone")

    def deleted(files: ModelFiles, *rest: Any) -> Any:
        if files.source.id == "gone":
            shutil.rmtree(gone)
        return load_pipeline(files, *rest)

    monkeypatch.setattr(read_model, "load_pipeline", deleted)
    with catalogue(tiny=tiny_folder, gone=gone) as models:
        models.load_of("tiny")
        picture = models.picture("tiny")
        failed = models.load("gone")
        assert isinstance(failed, ModelNotLoaded)
        assert str(gone) in failed.reason
        assert "\n" not in failed.reason
        assert not failed.out_of_memory
        assert models.picture("tiny") == picture


# ---- equal parts ----


def test_equal_parts_are_in_memory_once(tiny_folder: Path, tmp_path: Path) -> None:
    fine_tune = save_elsewhere(copy_of(tiny_folder, tmp_path / "fine", UNET))
    other = copy_of(tiny_folder, tmp_path / "other", UNET, TEXT_ENCODER)
    with catalogue(tiny=tiny_folder, fine=fine_tune, other=other) as models:
        loads = {}
        for id in ("tiny", "fine", "other"):
            loads[id] = models.load_of(id)
            held = held_bytes((load.weight_bytes, load.shared) for load in loads.values())
            assert models.live_bytes == held, "what is counted is what the weights take"
        pipelines: dict[str, Any] = dict(models.loop.models)
        encoders = {id: weights_of(m.prompts._text_encoder) for id, m in pipelines.items()}
        unets = {id: weights_of(m.unet) for id, m in pipelines.items()}
        assert encoders["tiny"] == encoders["fine"]
        assert not encoders["tiny"] & encoders["other"], "the negative control"
        assert not unets["tiny"] & unets["fine"]
        shared = {id: load.shared for id, load in loads.items()}
        assert len(shared["tiny"].keys() & shared["fine"].keys()) == 2, "VAE and text encoder"
        assert len(shared["tiny"].keys() & shared["other"].keys()) == 1, "the VAE"
        pictures = {id: models.picture(id) for id in pipelines}
        assert len(set(pictures.values())) == 3
        models.unload("tiny", keep=False)
        assert models.picture("fine") == pictures["fine"]
    for id, folder in (("tiny", tiny_folder), ("fine", fine_tune), ("other", other)):
        with catalogue(**{id: folder}) as alone:
            alone.load(id)
            assert alone.picture(id) == pictures[id]


def test_models_of_two_kinds_share_what_is_equal(tiny_folder: Path, tmp_path: Path) -> None:
    guided = save_elsewhere(copy_of(tiny_folder, tmp_path / "guided"))
    edit_index(guided, _class_name="StableDiffusionSAGPipeline")
    with catalogue(tiny=tiny_folder, guided=guided) as models:
        tiny = models.load_of("tiny")
        alone = models.live_bytes
        own = models.load_of("guided").bytes_by_component["unet"]
        assert models.live_bytes == alone + own == tiny.weight_bytes + own
        picture = models.picture("guided")
        assert picture != models.picture("tiny")
        models.unload("tiny", keep=False)
        assert models.picture("guided") == picture
    with catalogue(guided=guided) as one:
        one.load("guided")
        assert one.picture("guided") == picture


def test_a_shared_vae_has_tiles_of_its_models_size(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = copy_of(tiny_folder, tmp_path / "wide", UNET)
    (wide / "darkroom.json").write_text('{"size": 128}')
    monkeypatch.setattr(Catalogue, "fields", {"vae_tiling": True})
    with catalogue(tiny=tiny_folder, wide=wide) as models:
        tiny, also = models.load_of("tiny"), models.load_of("wide")
        assert len(tiny.shared.keys() & also.shared.keys()) == 2
        sides = {id: model.decoder.tile_pixels for id, model in models.loop.models.items()}
        assert sides == {"tiny": 32**2, "wide": 96**2}
        models.unload("wide", keep=True)
        assert models.load_of("wide").origin is WeightOrigin.HOST
        assert models.loop.models["wide"].decoder.tile_pixels == 96**2


def test_models_of_the_start_share_their_parts(tiny_folder: Path, tmp_path: Path) -> None:
    fine_tune = copy_of(tiny_folder, tmp_path / "fine", UNET)
    both = sources(tiny=tiny_folder, fine=fine_tune)
    loop = LoopUnderTest(config_for(tiny_folder, models=both))
    try:
        tiny, fine = loop.models["tiny"], loop.models["fine"]
        assert weights_of(tiny.prompts._text_encoder) == weights_of(fine.prompts._text_encoder)
        assert not weights_of(tiny.unet) & weights_of(fine.unet)
    finally:
        loop.close()


# ---- on a device with memory of its own ----


class OnDevice:
    """The same on the make-believe CUDA device: everything on this thread."""

    def __init__(self, cuda: FakeDevice, preset: Preset, **folders: Path) -> None:
        self.cuda = cuda
        self.sources = {source.id: source for source in sources(**folders)}
        self.events: list[Event] = []
        config = EngineConfig(
            models=(),
            catalogue=tuple(self.sources.values()),
            device="cuda",
            preset=preset,
            rows=4,
            measurement_cache=MEASUREMENTS.name,
        )
        self.loop, self.ready = start_loop(config, self.events.append)
        resident = self.loop._resident
        assert resident is not None
        self.resident = resident

    def attempt(self, id: str, *, keep: bool) -> ModelLoaded | ModelNotLoaded:
        self.resident.handle(LoadModel(self.sources[id], keep=keep))
        self.resident.settle()
        while self.resident.loader.loading:
            if self.resident.busy:
                self.resident.work()
            elif not self.loop._inbox.empty():
                change: Any = self.loop._inbox.get()
                self.resident.handle(change)
        return next(e for e in reversed(self.events) if isinstance(e, ModelLoaded | ModelNotLoaded))

    def load(self, id: str, *, keep: bool) -> ModelLoad:
        loaded = self.attempt(id, keep=keep)
        assert isinstance(loaded, ModelLoaded), loaded
        return loaded.load

    def unload(self, id: str, *, keep: bool) -> int:
        self.resident.handle(UnloadModel(id, keep))
        self.resident.settle()
        unloaded = next(e for e in reversed(self.events) if isinstance(e, ModelUnloaded))
        return unloaded.host_bytes


@pytest.fixture
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are read on the calling thread: the make-believe device knows one only."""

    class Here:
        def __init__(self, *, target: Any, args: Any, **_: Any) -> None:
            self.start = lambda: target(*args)

    monkeypatch.setattr(
        loader, "threading", type("Threads", (), {"Thread": Here, "Lock": threading.Lock})
    )
    monkeypatch.setattr(loader, "_own_stream", lambda _: nullcontext())
    monkeypatch.setattr(loader, "exclusive_settings", lambda _: nullcontext())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("on_this_thread")
@pytest.mark.parametrize("preset", [Preset.FAST, Preset.TINY])
def test_the_host_holds_what_leaves_the_device(
    preset: Preset, tiny_folder: Path, cuda: FakeDevice
) -> None:
    models = OnDevice(cuda, preset, tiny=tiny_folder)
    assert models.ready.host_free_bytes
    empty = cuda.live_bytes
    first = models.load("tiny", keep=True)
    assert first.host_bytes == sum(first.shared.values())
    held = cuda.live_bytes
    assert held - empty >= first.weight_bytes
    assert models.unload("tiny", keep=True) == first.host_bytes
    assert cuda.live_bytes < held - first.weight_bytes // 2
    again = models.load("tiny", keep=True)
    assert again.origin is WeightOrigin.HOST
    assert abs(cuda.live_bytes - held) < 0.1 * first.weight_bytes
    assert models.unload("tiny", keep=False) == 0
    assert models.load("tiny", keep=False).host_bytes == 0
    assert models.unload("tiny", keep=True) == 0, "the host has no copy"


@pytest.mark.usefixtures("on_this_thread")
def test_too_little_host_memory_costs_the_copy_only(
    tiny_folder: Path, cuda: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    models = OnDevice(cuda, Preset.FAST, tiny=tiny_folder)
    # The measurements of its first load copy from pinned memory too.
    models.load("tiny", keep=False)
    models.unload("tiny", keep=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    load = models.load("tiny", keep=True)
    assert (load.origin, load.host_bytes) == (WeightOrigin.DISK, 0)
    assert models.unload("tiny", keep=True) == 0


@pytest.mark.usefixtures("on_this_thread")
@pytest.mark.parametrize("equal", [True, False])
def test_the_device_holds_equal_text_encoders_once(
    equal: bool, tiny_folder: Path, tmp_path: Path, cuda: FakeDevice
) -> None:
    changed = [UNET] if equal else [UNET, TEXT_ENCODER, Path("vae") / UNET.name]
    fine = save_elsewhere(copy_of(tiny_folder, tmp_path / "fine", *changed))
    models = OnDevice(cuda, Preset.FAST, tiny=tiny_folder, fine=fine)
    empty = cuda.live_bytes
    tiny = models.load("tiny", keep=False)
    one = cuda.live_bytes - empty
    models.load("fine", keep=False)
    two = cuda.live_bytes - empty - one
    unet = tiny.bytes_by_component["unet"]
    expected = unet if equal else tiny.weight_bytes
    assert abs(two - expected) < 0.25 * tiny.weight_bytes
    assert (two < one - (tiny.weight_bytes - unet) // 2) == equal
    models.unload("tiny", keep=False)
    assert cuda.live_bytes - empty >= tiny.weight_bytes * 0.9, "the other one still has its parts"
    models.unload("fine", keep=False)
    assert cuda.live_bytes - empty < 0.25 * tiny.weight_bytes
