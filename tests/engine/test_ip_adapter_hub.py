"""IP-Adapters from a hub: the encoder that fits, and nothing else, is downloaded."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import structlog
from diffusers import UNet2DConditionModel

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.loading.ip_adapter import find_ip_adapter

from .hub import Hub, Repository, running_hub, unreachable_hub
from .ip_adapter_files import write_image_encoder, write_ip_adapter
from .test_hub import see

FILE = "sdxl_models/ip-adapter.safetensors"


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process sees, and an empty cache."""
    folder = tmp_path / "repository"
    write_ip_adapter(folder / FILE, UNet2DConditionModel.from_pretrained(tiny_folder / "unet"))
    write_image_encoder(folder / "sdxl_models" / "image_encoder", projection=40)
    write_image_encoder(folder / "models" / "image_encoder")
    (folder / "models" / "other.safetensors").write_text("no")
    (folder / "models" / "image_encoder" / "pytorch_model.bin").write_text("no")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    repositories = {"owner/ip": Repository({"main": folder})}
    with running_hub(repositories) as hub, structlog.testing.capture_logs():
        see(hub.url, monkeypatch)
        yield hub


def source(location: str) -> AdapterSource:
    return AdapterSource(id="tiny", location=location)


def test_what_fits_is_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_ip_adapter(source(f"owner/ip/{FILE}"))
    assert found.weights.is_file()
    assert found.encoder.relative_to(found.weights.parents[1]) == Path("models/image_encoder")
    encoder = "models/image_encoder/model.safetensors"
    assert {*hub.downloads("")} == {
        FILE,
        encoder,
        "models/image_encoder/config.json",
        "sdxl_models/image_encoder/config.json",
    }
    # An earlier download works without the hub.
    see(unreachable_hub(), monkeypatch)
    assert find_ip_adapter(source(f"owner/ip/{FILE}")) == found


@pytest.mark.parametrize("location", ["owner/ip/none.safetensors", "owner/none/a.safetensors"])
def test_what_the_hub_does_not_have(hub: Hub, location: str) -> None:
    with pytest.raises(StartupError) as caught:
        find_ip_adapter(source(location))
    assert location in str(caught.value)
    assert "\n" not in str(caught.value)
