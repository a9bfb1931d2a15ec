"""Later loads take what earlier ones found of equal architectures and equal weights."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.adapters import module, offering
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.components import previewer
from darkroom_server.engine.components.schedulers import config_of, make_scheduler
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.loading.findings import Findings
from darkroom_server.engine.loading.load_model import LoadedModel, load_model
from darkroom_server.engine.weights.store import WeightStore

from .conftest import config_for
from .tiny import write_tiny_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What loads find, instead of taking it from earlier ones."""
    found: list[str] = []

    def noted(name: str, find: Callable[..., Any]) -> Callable[..., Any]:
        def note_and_find(*given: Any) -> Any:
            found.append(name)
            return find(*given)

        return note_and_find

    layers, fit = module.row_layers_of, previewer.Previewer._fit
    monkeypatch.setattr(offering, "row_layers_of", noted("row layers", layers))
    monkeypatch.setattr(previewer.Previewer, "_fit", noted("preview map", fit))
    return found


@pytest.fixture
def load(one_thread: None) -> Callable[[Path], LoadedModel]:
    """Loads the folders of one engine."""
    findings, store = Findings(), WeightStore(torch.device("cpu"))

    def load(folder: Path) -> LoadedModel:
        source = ModelSource(id=folder.name, location=str(folder))
        config = config_for(folder, models=(source,), adapters_may_come=True)
        with torch.inference_mode():
            loaded = load_model(
                source, config, Adapters.of(config), ControlNets(config), store, findings
            )
        store.add(source.id, loaded.held)
        return loaded

    return load


def changed(folder: Path, part: str, name: str) -> Path:
    """A copy of ``folder`` called ``name`` with other weights of ``part``."""
    copied = folder.with_name(name)
    shutil.copytree(folder, copied)
    weights = safetensors.torch.load_file(copied / part / WEIGHTS)
    weights = {key: each * 1.5 for key, each in weights.items()}
    safetensors.torch.save_file(weights, copied / part / WEIGHTS, {"format": "pt"})
    return copied


def preview(loaded: LoadedModel) -> Any:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert loaded.model.previewer is not None
    return loaded.model.previewer.decode_preview(latents)


def row_layers(loaded: LoadedModel) -> Any:
    adapters: Any = loaded.model.adapters
    return adapters._modules["unet"]._row_layers


def test_a_model_is_called_for_what_no_earlier_load_found(
    tmp_path: Path, found: list[str], load: Callable[[Path], LoadedModel]
) -> None:
    first = write_tiny_model(tmp_path / "first")
    loaded = load(first)
    assert found == ["row layers", "preview map"]
    found.clear()
    again = load(changed(first, "unet", "other-unet"))
    assert found == []
    assert row_layers(again) == row_layers(loaded)
    assert row_layers(again)
    assert (preview(again) == preview(loaded)).all()
    other = load(changed(first, "vae", "other-vae"))
    assert found == ["preview map"]
    assert not (preview(other) == preview(loaded)).all()


def test_another_architecture_is_called(
    tmp_path: Path, found: list[str], load: Callable[[Path], LoadedModel]
) -> None:
    first = write_tiny_model(tmp_path / "first")
    load(first)
    found.clear()
    copied = first.with_name("other-config")
    shutil.copytree(first, copied)
    config = copied / "unet" / "config.json"
    text = config.read_text()
    assert '"flip_sin_to_cos": true' in text
    config.write_text(text.replace('"flip_sin_to_cos": true', '"flip_sin_to_cos": false'))
    load(copied)
    assert found == ["row layers"]


def test_a_map_of_unknown_weights_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter((1.0, 2.0))
    monkeypatch.setattr(previewer.Previewer, "_fit", lambda _: torch.full((5, 3), next(sizes)))
    maps: dict[str, torch.Tensor] = {}
    for size in (1.0, 2.0):
        made = previewer.Previewer(None, nullcontext, 8)
        made.fit(maps, "")
        assert made._projection is not None
        assert made._projection[0, 0] == size
    assert maps == {}


def test_schedulers_are_new_for_everybody() -> None:
    own = make_scheduler(SchedulerName.DDIM, {"_class_name": "DDIMScheduler", "beta_start": 0.0002})
    config = config_of(own)
    first = make_scheduler(SchedulerName.EULER, config)
    first.set_timesteps(5)
    first.sigmas[0] = 99.0
    first.alphas_cumprod[0] = 99.0
    second = make_scheduler(SchedulerName.EULER, config)
    assert second is not first
    assert second.num_inference_steps is None
    assert second.alphas_cumprod[0] < 1.0
    other = make_scheduler(SchedulerName.EULER, {**config, "beta_start": 0.001})
    assert other.config.beta_start == 0.001
    assert second.config.beta_start == 0.0002
