"""Describes the models of the catalogue from their configurations: no weight is read."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.catalog import ModelDescription
from darkroom_server.core.engine_config import EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.file_stamps import stamp_or_none
from darkroom_server.core.model import MemoryNeeds, ModelInfo
from darkroom_server.core.model_runtime import ModelSpeed, RowLimitSource
from darkroom_server.engine.adapters.offering import Adapters
from darkroom_server.engine.catalogue.fetching import is_on_hub, weights_on_hub
from darkroom_server.engine.catalogue.meta_pipeline import (
    configuration_from_hub,
    meta_pipeline,
)
from darkroom_server.engine.controls.offering import ControlNets
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import one_line
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.loading.defaults import FILE, read_defaults
from darkroom_server.engine.loading.fit import weight_bytes
from darkroom_server.engine.loading.folder import INDEX
from darkroom_server.engine.loading.model_info import model_info, set_size
from darkroom_server.engine.loading.pipeline import ModelFiles
from darkroom_server.engine.loading.read_model import files_of
from darkroom_server.engine.warmup.measurement import cache_key
from darkroom_server.engine.warmup.measurement_cache import MeasurementCache
from darkroom_server.engine.warmup.placement import memory_format_of
from darkroom_server.engine.warmup.presets import Runtime, resolve

log = structlog.get_logger(__name__)


class Catalogue:
    """Describes models; those of equal configuration are described once.

    ``adapters`` and ``controlnets`` record which of them fit the models.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        adapters: Adapters,
        controlnets: ControlNets,
    ) -> None:
        self._config = config
        self._device = device
        self._adapters = adapters
        self._controlnets = controlnets
        self._known: dict[str, ModelInfo] = {}

    def describe_all(self, sources: Iterable[ModelSource]) -> tuple[ModelDescription, ...]:
        """The descriptions of ``sources``; one that cannot be described has the reason."""
        began = time.monotonic()
        found = tuple(self._describe_or_why(source) for source in sources)
        if found:
            log.info(
                "catalogue described",
                models=len(found),
                unusable=[each.id for each in found if each.info is None],
                seconds=round(time.monotonic() - began, 2),
            )
        return found

    def _describe_or_why(self, source: ModelSource) -> ModelDescription:
        previous = {info.id: info for info in self._config.previous_measurements}.get(source.id)
        stamp = stamp_or_none(Path(source.location).expanduser())
        return replace(self._described_or_why(source, previous), stamp=stamp)

    def _described_or_why(
        self, source: ModelSource, previous: ModelInfo | None
    ) -> ModelDescription:
        try:
            return self._describe(source, previous)
        except StartupError as error:
            log.warning("model cannot be described", model=source.id, why=str(error))
            why = str(error)
        except Exception as error:
            # Of a family that needs its weights to be described, or of a broken file.
            log.warning("model cannot be described", model=source.id, exc_info=True)
            why = f"it cannot be described without its weights ({one_line(error)}); load it first"
        if previous is not None:
            self._record_fitting(previous)
        return ModelDescription(id=source.id, info=previous, reason=why)

    def _describe(self, source: ModelSource, previous: ModelInfo | None) -> ModelDescription:
        files, runtime = self._files_of(source, previous)
        size = weight_bytes(files, runtime)
        if not size and is_on_hub(source):
            size = weights_on_hub(source)
        if previous is not None:
            self._record_fitting(previous)
            return ModelDescription(id=source.id, info=previous, weight_bytes=size)
        key = _configuration(files)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._info(files, runtime, size)
        return ModelDescription(
            id=source.id, info=replace(known, id=source.id, revision=""), weight_bytes=size
        )

    def _files_of(
        self, source: ModelSource, previous: ModelInfo | None
    ) -> tuple[ModelFiles, Runtime]:
        """The files of ``source``; of one that is not on this machine, only its configuration."""
        if not is_on_hub(source):
            return files_of(source, self._config, previous)
        try:
            return files_of(replace(source, may_download=False), self._config, previous)
        except StartupError:
            if not source.may_download:
                raise
        files = configuration_from_hub(source)
        return files, resolve(self._config, files.family.half)

    def _record_fitting(self, info: ModelInfo) -> None:
        for offer in info.adapters:
            if offer.kind is AdapterKind.CONTROLNET:
                self._controlnets.fitting.add(offer.id)
            else:
                self._adapters.fitting[info.id, offer.id] = offer

    def _info(self, files: ModelFiles, runtime: Runtime, size: int) -> ModelInfo:
        source, config = files.source, self._config
        family = family_of(meta_pipeline(files))
        family.check_pipeline(source.location)
        defaults = read_defaults(source, family.model_defaults)
        set_size(source.location, family, defaults.size)
        memory_format = memory_format_of(family, runtime)
        merged = not family.unbatched_reason
        # What other models take now can be freed for this one.
        available = max(0, available_bytes(self._device) - size)
        memory = MemoryNeeds(
            pixels=family.size**2, bytes_per_row=0, bytes_per_decode=0, available_bytes=available
        )
        rows, speed, origin = 2, ModelSpeed(), RowLimitSource.MEASURED
        key = cache_key(family, memory_format, runtime, config)
        found = MeasurementCache(config.measurement_cache, key).load()
        if found is not None:
            rows, origin = found.max_rows, RowLimitSource.REMEMBERED
            speed = ModelSpeed(passes=found.passes, decode=found.decode, encode=found.encode)
            memory = replace(
                memory,
                bytes_per_row=found.bytes_per_row,
                bytes_per_pass=found.bytes_per_pass,
                bytes_per_decode=found.bytes_per_decode,
            )
        if config.rows is not None and merged:
            rows, origin = config.rows, RowLimitSource.SET
        return model_info(
            source.id,
            family,
            defaults,
            runtime,
            memory_format,
            config,
            revision="",
            memory=memory,
            max_rows=rows,
            most_rows=rows,
            source=origin,
            speed=speed,
            offers={
                "loras": self._adapters.offer(source.id, family, memory_format.dtype)
                if runtime.takes_adapters
                else (),
                "controls": self._controlnets.described(source.id, family),
            },
            takes_loras=runtime.takes_adapters and self._adapters.may_fit(family),
            takes_ip_adapter=files.ip_adapter is not None,
        )


def _configuration(files: ModelFiles) -> str:
    """A digest of all that a description depends on, but the weights."""
    form = (files.family.pipeline_class, files.ip_adapter, files.source.quantize)
    digest = hashlib.sha256(str(form).encode())
    if not files.index:
        # Each file by itself: its keys decide.
        digest.update(f"{files.path} {files.source.config}".encode())
        return digest.hexdigest()
    for file in sorted(_configuration_files(files.path)):
        digest.update(str(file.relative_to(files.path)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _configuration_files(folder: Path) -> list[Path]:
    own = [folder / INDEX, folder / FILE]
    inner = [file for file in folder.glob("*/*") if file.suffix in (".json", ".txt", ".model")]
    return [file for file in (*own, *inner) if file.is_file()]
