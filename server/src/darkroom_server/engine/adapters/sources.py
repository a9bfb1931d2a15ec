"""Finds the file of a LoRA adapter: a file, a folder with one, or a repository of the hub."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import structlog

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.failures import one_line
from darkroom_server.engine.loading.hub_errors import HUB_TIMEOUT, explain

log = structlog.get_logger(__name__)

USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names that diffusers and PEFT give their files."""


@dataclass(frozen=True, slots=True)
class AdapterFound:
    """The file of ``source``; None if there is none, for ``reason``."""

    source: AdapterSource
    file: Path | None
    reason: str = ""


def find_adapter(source: AdapterSource) -> AdapterFound:
    """Look for the file of an adapter; downloads it if ``source`` is a hub id."""
    try:
        return AdapterFound(source, adapter_file(source))
    except StartupError as error:
        return AdapterFound(source, None, str(error))


def adapter_file(source: AdapterSource) -> Path:
    """The file of an adapter; downloads it if ``source`` is a hub id. Raises ``StartupError``."""
    path = Path(source.location).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise StartupError(f"LoRA {source.location!r} is not a .safetensors file: convert it")
        return path
    if source.from_folder:
        # Never from the hub, where its path may be the name of a repository.
        raise StartupError(f"LoRA file {source.location!r} is not there")
    if path.is_dir():
        return path / _only([file.name for file in path.glob("*.safetensors")], source)
    return _download(source)


def _download(source: AdapterSource) -> Path:
    """The file in the hub's cache; downloads it if it is missing there."""
    name = source.location
    options: dict[str, Any] = {"revision": source.revision, "token": source.token}
    try:
        # The first call alone has a time limit.
        info = huggingface_hub.model_info(name, timeout=HUB_TIMEOUT, **options)
        files = [file.rfilename for file in info.siblings or ()]
        weights = _only([file for file in files if "/" not in file], source)
        if "adapter_config.json" in files:
            huggingface_hub.hf_hub_download(name, "adapter_config.json", **options)
        return Path(huggingface_hub.hf_hub_download(name, weights, **options))
    except StartupError:
        raise
    except Exception as error:
        log.debug("hub failed", exc_info=True)
        why, remedy = explain(error, source.revision) or (
            one_line(error),
            "check its name, HF_TOKEN and the network, or give a file",
        )
        # An earlier download works without the hub, the network and the token.
        with suppress(Exception):  # If the cache is unusable too, the hub's own error is raised.
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **options))
            file = folder / _only([each.name for each in folder.iterdir()], source)
            log.warning("the hub's cache is used", adapter=source.id, hub=why)
            return file
        raise StartupError(
            f"LoRA {name!r} is not cached, and the hub does not provide it ({why}); {remedy}"
        ) from error


def _only(names: Iterable[str], source: AdapterSource) -> str:
    """The one adapter's file among ``names``."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    usual = [name for name in USUAL_NAMES if name in found]
    if usual:
        return usual[0]
    if len(found) != 1:
        raise StartupError(
            f"LoRA {source.location!r} has {len(found)} .safetensors files, not one; give the file"
        )
    return found[0]
