"""LoRA adapters from a hub: revisions, tokens, PEFT's layout, and a hub that does not answer."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import structlog

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.adapters.reading import configuration
from darkroom_server.engine.adapters.sources import adapter_file

from .hub import MEMBER, STRANGER, Hub, Repository, running_hub, unreachable_hub
from .test_hub import see, tokens


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process sees, and an empty cache."""

    def branch(name: str, **files: str) -> Path:
        folder = tmp_path / "repositories" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    weights = "pytorch_lora_weights__safetensors"
    styles = {
        "main": branch("main", **{weights: "first", "other__safetensors": "no"}),
        "v2": branch("v2", **{weights: "second"}),
    }
    peft = branch(
        "peft", adapter_model__safetensors="peft", adapter_config__json='{"lora_alpha": 2}'
    )
    two = branch("two", a__safetensors="a", b__safetensors="b")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    repositories = {
        "owner/styles": Repository(styles, gated=True),
        "owner/peft": Repository({"main": peft}),
        "owner/two": Repository({"main": two}),
    }
    with running_hub(repositories) as hub, structlog.testing.capture_logs():
        see(hub.url, monkeypatch)
        yield hub


def source(location: str, revision: str | None = None, token: str | None = None) -> AdapterSource:
    return AdapterSource(id="style", location=location, revision=revision, token=token)


def test_a_revision_of_a_gated_repository(hub: Hub) -> None:
    for revision, text in (
        (None, "first"),
        ("v2", "second"),
        (hub.repositories["owner/styles"].commit("v2"), "second"),
    ):
        file = adapter_file(source("owner/styles", revision, MEMBER))
        assert file.read_text() == text
    # Nothing but the weights, by their usual name.
    assert set(hub.downloads("")) == {"pytorch_lora_weights.safetensors"}
    assert tokens(hub, "owner/styles") == {MEMBER}


def test_the_configuration_of_peft_comes_with_its_weights(hub: Hub) -> None:
    file = adapter_file(source("owner/peft"))
    assert file.read_text() == "peft"
    assert json.loads(file.with_name("adapter_config.json").read_text()) == {"lora_alpha": 2}
    assert configuration(None, file) == {"base_model.model.lora_alpha": 2}


def test_what_was_downloaded_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = adapter_file(source("owner/styles", token=MEMBER))
    see(unreachable_hub(), monkeypatch)
    with structlog.testing.capture_logs() as lines:
        assert adapter_file(source("owner/styles", token=MEMBER)) == first
    assert [line["event"] for line in lines if "hub" in line] == ["the hub's cache is used"]
    for absent in (source("owner/peft"), source("owner/styles", "v2", MEMBER)):
        with pytest.raises(StartupError, match="is not cached, and the hub does not provide it"):
            adapter_file(absent)


@pytest.mark.parametrize(
    ("location", "token", "complaint"),
    [
        ("owner/none", MEMBER, "there is no such model, or it is private"),
        ("owner/styles", STRANGER, "access to it is restricted); accept its licence"),
        ("/not/a/file", None, "check its name, HF_TOKEN and the network, or give a file"),
        ("owner/two", None, "has 2 .safetensors files, not one; give the file"),
    ],
)
def test_the_operator_reads_why_there_is_none(
    location: str, token: str | None, complaint: str, hub: Hub
) -> None:
    with pytest.raises(StartupError) as caught:
        adapter_file(source(location, token=token))
    assert complaint in str(caught.value)
    assert location in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_folder_that_is_gone_is_not_looked_for_on_the_hub(hub: Hub) -> None:
    """Its path may be the name of a repository."""
    gone = AdapterSource(id="peft", location="owner/peft", from_folder=True)
    with pytest.raises(StartupError, match="is not there"):
        adapter_file(gone)
    assert not hub.calls
