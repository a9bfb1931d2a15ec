"""Parses what folders, files and hub ids the settings name, into engine configurations."""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import structlog

from darkroom_server.core.adapter_places import ADAPTER_ID, AdapterPlaces
from darkroom_server.core.engine_config import (
    AdapterSource,
    ControlNetSource,
    EngineConfig,
    ModelSource,
)
from darkroom_server.core.errors import StartupError
from darkroom_server.core.model_places import ModelsFolder
from darkroom_server.core.quantization import Quantization, Quantize
from darkroom_server.settings.models import Models
from darkroom_server.settings.models_folder import models_below
from darkroom_server.settings.state_folder import compiled_folder, measurement_folder
from darkroom_server.settings.tree import Settings

log = structlog.get_logger(__name__)

DEMO = "demo"
DEMO_MODEL = Path(str(files("darkroom_server") / "demo_model"))
DEMO_ADAPTERS = Path(str(files("darkroom_server") / "demo_adapters"))
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
HUB_FILE = re.compile(r"[\w][\w.-]*(/[\w][\w. -]*){2,}\.safetensors", re.ASCII)
MODEL_ID = re.compile(r"[\w][\w./-]{0,127}", re.ASCII)


def engine_configs(settings: Settings, hub_token: str | None) -> list[EngineConfig]:
    """Return one configuration per engine; raises ``StartupError`` for an invalid source."""
    config = _engine_config(settings, hub_token)
    devices = settings.engine.device.split(",")
    return [replace(config, device=d) for d in devices for _ in range(settings.engine.engines)]


def _engine_config(settings: Settings, hub_token: str | None) -> EngineConfig:
    engine = settings.engine
    cache, compiled = measurement_folder(settings), compiled_folder(settings)
    places = adapter_places(settings, hub_token)
    sources = _configured(settings, hub_token)
    at_start = {source.id for source in sources_at_start(settings.models)}
    return EngineConfig(
        models=tuple(source for source in sources if source.id in at_start),
        catalogue=tuple(source for source in sources if source.id not in at_start),
        dtype=engine.dtype,
        preset=engine.preset,
        attention=engine.attention,
        slice_size=engine.slice_size,
        autocast=engine.autocast,
        vae_tiling=engine.vae_tiling,
        channels_last=engine.channels_last,
        threads=engine.threads,
        rows=engine.rows,
        max_rows=engine.max_rows,
        prompt_cache_bytes=engine.prompt_cache_bytes,
        measurement_cache=str(cache) if cache else None,
        compile=engine.compile,
        compile_cache=str(compiled) if compiled else None,
        safety_checker=engine.safety_checker,
        offload=settings.models.offload,
        adapters=places.sources(),
        adapters_may_come=places.configured,
        max_loras=settings.adapters.max_loras,
        max_request_loras=settings.adapters.max_request_loras,
        max_lora_rank=settings.adapters.max_lora_rank,
        lora_cache_bytes=settings.adapters.lora_cache_bytes,
        max_reference_images=settings.images.max_reference_images,
        controlnets=controlnet_sources(settings, hub_token),
        max_controls=settings.adapters.max_controls,
    )


def load_times_file(settings: Settings) -> tuple[Path | None, str]:
    """The file that remembers how long loads take, and the key of these models and devices."""
    folder = measurement_folder(settings)
    sources = [source.location for source in sources_at_start(settings.models)]
    key = json.dumps([*sources, settings.engine.device, settings.engine.engines])
    return (folder / "load-times.json" if folder else None), key


def all_sources(models: Models, hub_token: str | None = None) -> tuple[ModelSource, ...]:
    """Return the source of each model of the catalogue: of ``--model``, then of ``--models-dir``.

    Raises ``StartupError``.
    """
    named = model_sources(models, hub_token)
    if models.models_dir is None:
        return named
    folder = Path(models.models_dir).expanduser()
    if not folder.is_dir():
        raise StartupError(f"--models-dir {models.models_dir}: no such folder")
    taken = {source.id for source in named}
    found = _in_folder(models, taken, hub_token, warn=log.warning)
    if not named and not found:
        raise StartupError(f"--models-dir {models.models_dir}: there is no model in it")
    return (*named, *found)


def models_folder(settings: Settings, hub_token: str | None) -> ModelsFolder | None:
    """The folder of ``--models-dir``, in which models come and go; None without it.

    Raises ``StartupError``.
    """
    models = settings.models
    if models.models_dir is None:
        return None
    folder = Path(models.models_dir).expanduser()
    named = {source.id for source in model_sources(models)} if models.model else set()
    first = {each.id: each for each in _configured(settings, hub_token) if each.id not in named}

    def find() -> tuple[ModelSource, ...] | None:
        if not folder.is_dir():
            return None
        found = _in_folder(models, named, hub_token, warn=log.debug)
        # Those of the start may be quantised, or have an IP-Adapter.
        return tuple(
            known if (known := first.get(each.id)) and known.location == each.location else each
            for each in found
        )

    return ModelsFolder(first, find)


def _in_folder(
    models: Models, taken: Collection[str], hub_token: str | None, warn: Callable[..., object]
) -> list[ModelSource]:
    """The models below ``--models-dir`` whose names are not ``taken``."""
    found = []
    for name, path in models_below(Path(models.models_dir or "").expanduser()):
        if not MODEL_ID.fullmatch(name):
            warn("model left out", path=str(path), why="its path cannot be a model's name")
        elif name in taken:
            warn("model left out", path=str(path), why=f"another one is named {name!r}")
        else:
            found.append(
                ModelSource(
                    id=name,
                    location=str(path),
                    variant=models.variant,
                    config=models.model_config if path.is_file() else None,
                    token=hub_token,
                    may_download=models.allow_download,
                )
            )
    return found


def _configured(settings: Settings, hub_token: str | None) -> tuple[ModelSource, ...]:
    """Every model, with its IP-Adapter and its quantization. Raises ``StartupError``."""
    return with_quantization(
        with_ip_adapters(all_sources(settings.models, hub_token), settings.adapters.ip_adapter),
        settings.models.quantize,
    )


def sources_at_start(models: Models, hub_token: str | None = None) -> tuple[ModelSource, ...]:
    """Return the source of each model that is loaded at start. Raises ``StartupError``."""
    return () if models.on_demand else model_sources(models, hub_token)


def model_sources(models: Models, hub_token: str | None = None) -> tuple[ModelSource, ...]:
    """Return the source of each model of ``--model``; the demo model if there is none at all.

    Raises ``StartupError``.
    """
    sources: list[ModelSource] = []
    for text in models.model or ((DEMO,) if models.models_dir is None else ()):
        name, location, revision = _parse(text)
        if not MODEL_ID.fullmatch(name):
            raise StartupError(
                f"--model {text}: {name!r} cannot be a model's name; put NAME= of letters, digits "
                "and . _ / - before it"
            )
        if any(source.id == name for source in sources):
            raise StartupError(
                f"--model {text}: another model is named {name!r} already; put NAME= before one"
            )
        sources.append(
            ModelSource(
                id=name,
                location=location,
                revision=revision,
                variant=models.variant,
                config=models.model_config,
                token=hub_token,
                may_download=models.allow_download or not models.on_demand,
            )
        )
    return tuple(sources)


def adapter_places(settings: Settings, hub_token: str | None = None) -> AdapterPlaces:
    """Return the adapters that ``--lora`` names, the folder of ``--lora-dir``, the demo model's.

    Raises ``StartupError``.
    """
    adapters = settings.adapters
    named: dict[str, AdapterSource] = {}
    for text in adapters.lora:
        name, equals, rest = text.partition("=")
        if not equals or not ADAPTER_ID.fullmatch(name):
            raise StartupError(
                f"--lora {text}: put NAME= of letters, digits and . _ / - before the adapter"
            )
        if name in named:
            raise StartupError(f"--lora {text}: another adapter is named {name!r} already")
        location, revision = _location_of(rest, f"--lora {text}")
        named[name] = AdapterSource(id=name, location=location, revision=revision, token=hub_token)
    folder = None if adapters.lora_dir is None else Path(adapters.lora_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise StartupError(f"--lora-dir {adapters.lora_dir}: no such folder")
    own = _demo_loras() if _demo_models(settings.models) else ()
    return AdapterPlaces(tuple(named.values()), folder, own)


def _demo_loras() -> tuple[AdapterSource, ...]:
    return tuple(
        AdapterSource(id=file.stem, location=str(file))
        for file in sorted((DEMO_ADAPTERS / "loras").glob("*.safetensors"))
    )


def _demo_models(models: Models) -> list[str]:
    """The ids of the models that are the demo model."""
    return [source.id for source in all_sources(models) if source.location == str(DEMO_MODEL)]


def with_ip_adapters(
    models: tuple[ModelSource, ...], ip_adapters: tuple[str, ...]
) -> tuple[ModelSource, ...]:
    """``models`` with the IP-Adapters of ``--ip-adapter``. Raises ``StartupError``."""
    found: dict[str, AdapterSource] = {}
    tokens = {model.id: model.token for model in models}
    for text in ip_adapters:
        option = f"--ip-adapter {text}"
        name, equals, rest = text.partition("=")
        if not equals or name not in tokens:
            names = ", ".join(tokens)
            raise StartupError(f"{option}: put MODEL= before the file, with a model of: {names}")
        if name in found:
            raise StartupError(f"{option}: model {name!r} has another one already")
        location, at, revision = (rest, "", "") if _exists(rest) else rest.partition("@")
        if at and not revision:
            raise StartupError(f"{option}: the revision after @ is missing")
        if not _exists(location) and not HUB_FILE.fullmatch(location):
            raise StartupError(f"{option}: no such file, and no .safetensors of the hub either")
        found[name] = AdapterSource(
            id=name, location=location, revision=revision or None, token=tokens[name]
        )
    return tuple(replace(model, ip_adapter=found.get(model.id)) for model in models)


def with_quantization(
    models: tuple[ModelSource, ...], quantize: tuple[str, ...]
) -> tuple[ModelSource, ...]:
    """``models`` as ``--quantize`` stores their weights. Raises ``StartupError``."""
    found: dict[str, Quantize] = {}
    ids = [model.id for model in models]
    for text in quantize:
        option = f"--quantize {text}"
        name, equals, rest = text.partition("=")
        if not equals or name not in ids:
            raise StartupError(f"{option}: put MODEL= before it, with a model of: {', '.join(ids)}")
        if name in found:
            raise StartupError(f"{option}: model {name!r} is quantised already")
        kind, colon, file = rest.partition(":")
        if kind not in list(Quantization) or (kind == Quantization.GGUF) != bool(file):
            raise StartupError(f"{option}: use int8, fp8, fp8-dynamic, nf4 or gguf:FILE")
        found[name] = Quantize(Quantization(kind), file if colon else None)
    return tuple(replace(model, quantize=found.get(model.id)) for model in models)


def controlnet_sources(
    settings: Settings, hub_token: str | None = None
) -> tuple[ControlNetSource, ...]:
    """Return the source of each ControlNet: of ``--controlnet``, then the demo model's.

    Raises ``StartupError``.
    """
    sources: list[ControlNetSource] = []
    models = {source.id for source in all_sources(settings.models)}
    taken = {source.id for source in adapter_places(settings).sources()}
    for text in settings.adapters.controlnet:
        option = f"--controlnet {text}"
        target, equals, rest = text.partition("=")
        model, colon, name = target.rpartition(":")
        if not equals or not MODEL_ID.fullmatch(name):
            raise StartupError(
                f"{option}: put NAME= of letters, digits and . _ / - before the ControlNet"
            )
        if colon and model not in models:
            raise StartupError(f"{option}: no model is named {model!r}")
        for other in sources:
            if other.id == name and (other.model in (None, model) or not colon):
                raise StartupError(f"{option}: another ControlNet is named {name!r} already")
        if name in taken:
            raise StartupError(f"{option}: a LoRA adapter is named {name!r} already")
        location, revision = _location_of(rest, option)
        sources.append(
            ControlNetSource(
                id=name,
                location=str(Path(location).expanduser()) if _exists(location) else location,
                model=model if colon else None,
                revision=revision,
                token=hub_token,
            )
        )
    taken |= {source.id for source in sources}
    packaged = sorted((DEMO_ADAPTERS / "controlnets").iterdir())
    sources += [
        ControlNetSource(id=folder.name, location=str(folder), model=model)
        for model in _demo_models(settings.models)
        for folder in packaged
        if folder.name not in taken
    ]
    return tuple(sources)


def _location_of(text: str, option: str) -> tuple[str, str | None]:
    """Return location and revision of a path, which wins if it exists, or a hub id."""
    if _exists(text):
        return text, None
    location, at, revision = text.partition("@")
    if at and not revision:
        raise StartupError(f"{option}: the revision after @ is missing")
    if not HUB_ID.fullmatch(location):
        raise StartupError(f"{option}: no such file or folder, and no hub id either")
    return location, revision or None


def _parse(text: str) -> tuple[str, str, str | None]:
    """Return name, location and revision. A path that exists wins: it may contain @ or =."""
    if _exists(text):
        return _name_of(text), text, None
    name, equals, rest = text.partition("=")
    if not equals:
        name, rest = "", text
    elif not name:
        raise StartupError(f"--model {text}: the name before = is missing")
    if _exists(rest):
        return name or _name_of(rest), rest, None
    if rest == DEMO:
        return name or DEMO, str(DEMO_MODEL), None
    location, revision = _location_of(rest, f"--model {text}")
    return name or location, location, revision


def _exists(text: str) -> bool:
    return bool(text) and Path(text).expanduser().exists()


def _name_of(path: str) -> str:
    resolved = Path(path).expanduser().resolve()
    return resolved.name if resolved.is_dir() else resolved.stem
