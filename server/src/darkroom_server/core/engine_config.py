"""The engine's configuration: plain data that crosses process boundaries."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

from darkroom_server.core.events import Correction
from darkroom_server.core.model import ModelInfo
from darkroom_server.core.quantization import Offload, Quantize

PROMPT_CACHE_BYTES = 256 * 1024**2
"""The default of ``EngineConfig.prompt_cache_bytes``."""

MAX_FAILED_RESTARTS = 2
"""Restarts in a row that may fail before the models are loaded one by one."""


class Preset(StrEnum):
    """Defaults for the options of ``EngineConfig``; AUTO is FRUGAL on CUDA, else FAST.

    MAX is FAST with more of what takes long to prepare.
    """

    AUTO = "auto"
    FRUGAL = "frugal"
    FAST = "fast"
    MAX = "max"
    TINY = "tiny"

    @property
    def is_fast(self) -> bool:
        """Whether it is for speed, not for little memory."""
        return self in (Preset.FAST, Preset.MAX)


class Compile(StrEnum):
    """When the denoiser of a model is compiled.

    CACHED uses what is on disk. BACKGROUND compiles in a process of its own while the model is
    served, BLOCKING before it is.
    """

    OFF = "off"
    CACHED = "cached"
    BACKGROUND = "background"
    BLOCKING = "blocking"


class Dtype(StrEnum):
    """The weights' type; with AUTO the preset and the device decide."""

    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Attention(StrEnum):
    """SLICED is diffusers' ``enable_attention_slicing``, SDPA torch's fused attention."""

    SLICED = "sliced"
    SDPA = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from: a folder, a single file or a hub id. ``id`` is its name here.

    ``config`` is a pipeline folder that describes a single file. ``token`` is for the hub.
    ``ip_adapter`` is loaded into it, None for none. ``quantize``: its weights are stored in fewer
    bits. ``may_download``: what is missing on this
    machine is fetched from the hub.
    """

    id: str
    location: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    token: str | None = None
    ip_adapter: "AdapterSource | None" = None
    may_download: bool = True
    quantize: Quantize | None = None

    def __repr__(self) -> str:
        """Without the token, which must not be logged."""
        return (
            f"ModelSource(id={self.id!r}, location={self.location!r}, revision={self.revision!r})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """Where an adapter comes from: a file, a folder or a hub id.

    ``id`` is the name of a LoRA adapter here, and the model's of an IP-Adapter.
    ``from_folder``: it was found in the folder of adapters, and need not fit any model.
    ``withdrawn``: only jobs that were accepted before may use it; it need not exist any more.
    ``token`` is for the hub.
    """

    id: str
    location: str
    revision: str | None = None
    from_folder: bool = False
    withdrawn: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetSource:
    """Where a ControlNet comes from: a folder or a hub id. ``id`` is its name here.

    ``model`` is the id of the model it is for, None for each that it fits. ``token`` is for the
    hub.
    """

    id: str
    location: str
    model: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs its models; None means the preset's value.

    ``models`` are loaded at the start, those of ``catalogue`` when they are asked for.
    ``device``: "auto", "cpu", "cuda" or "cuda:N". ``slice_size``: "auto", "max" or a number.
    ``threads``: for torch on a CPU, None for what the cgroup allows. ``rows``: the row limit of
    batches; None: it is measured, and corrected while the engine runs, but never above
    ``max_rows``. ``measurement_cache``: the folder that remembers measurements, None for none.
    ``compile_cache``: the folder of compiled denoisers; with None nothing is compiled.
    ``previous_measurements``: from an earlier engine of this server, so that a restarted one is
    ready sooner. ``prompt_cache_bytes``: memory for the embeddings of prompts, for each model.
    ``adapters_may_come``: adapters may be offered while the engine runs, even if there are none
    yet. ``adapters_may_fail``: an adapter that is gone or damaged is left out, though the operator
    named it: the server runs, and stops for none. ``max_loras``: different LoRA adapters in one
    batch. ``max_request_loras``: those in one request, if a batch may have as many.
    ``max_lora_rank``: one with a greater rank is rejected. ``lora_cache_bytes``: host memory for
    the weights of adapters. ``max_controls``: ControlNets in one request.
    ``max_reference_images``: of one edit, if its model takes as many.
    """

    models: tuple[ModelSource, ...]
    catalogue: tuple[ModelSource, ...] = ()
    device: str = "auto"
    dtype: Dtype = Dtype.AUTO
    preset: Preset = Preset.AUTO
    attention: Attention | None = None
    slice_size: str | None = None
    autocast: bool | None = None
    vae_tiling: bool | None = None
    channels_last: bool | None = None
    threads: int | None = None
    rows: int | None = None
    max_rows: int | None = None
    measurement_cache: str | None = None
    compile: Compile | None = None
    compile_cache: str | None = None
    prompt_cache_bytes: int = PROMPT_CACHE_BYTES
    safety_checker: bool = False
    offload: Offload = Offload.NONE
    adapters: tuple[AdapterSource, ...] = ()
    adapters_may_come: bool = False
    adapters_may_fail: bool = False
    max_loras: int = 8
    max_request_loras: int = 4
    max_lora_rank: int = 128
    lora_cache_bytes: int = 1024**3
    max_reference_images: int = 4
    controlnets: tuple[ControlNetSource, ...] = ()
    max_controls: int = 4
    previous_measurements: tuple[ModelInfo, ...] = ()

    def with_measurements(self, models: tuple[ModelInfo, ...], device: str = "") -> Self:
        """The configuration of an engine that replaces one that ran ``models`` on ``device``.

        It runs on the same device or fails: with a lost GPU, "auto" would select the CPU, with the
        GPU's measurements. What was measured of other models stays.
        """
        device = models[0].runtime.device if models else device or self.device
        measured = {info.id: info for info in (*self.previous_measurements, *models)}
        return replace(
            self,
            device=device,
            previous_measurements=tuple(measured.values()),
            adapters_may_fail=True,
        )

    def source_of(self, model_id: str) -> ModelSource:
        """Where the model comes from. Raises ``KeyError`` for one that is not configured."""
        return {each.id: each for each in (*self.models, *self.catalogue)}[model_id]

    def on_demand(self, model_id: str) -> Self:
        """The configuration in which the model is not loaded at the start any more."""
        unpinned = tuple(each for each in self.models if each.id == model_id)
        return replace(
            self,
            models=tuple(each for each in self.models if each.id != model_id),
            catalogue=(*self.catalogue, *unpinned),
        )

    def after_failed_restarts(self, failed: int) -> Self:
        """The configuration of a restart after ``failed`` ones in a row that did not load.

        After two, none of several models is loaded at the start: the file of one may have broken,
        and loads of their own say whose.
        """
        if failed < MAX_FAILED_RESTARTS or len(self.models) + len(self.catalogue) < 2:
            return self
        return replace(self, models=(), catalogue=(*self.catalogue, *self.models))

    def with_models(self, sources: Iterable[ModelSource]) -> Self:
        """The configuration with ``sources`` in the catalogue, in place of those of their ids."""
        new = {source.id: source for source in sources}
        others = [each for each in self.catalogue if each.id not in new]
        return replace(self, catalogue=(*others, *new.values()))

    def without_models(self, ids: Collection[str]) -> Self:
        """The configuration without these models in the catalogue."""
        catalogue = tuple(each for each in self.catalogue if each.id not in ids)
        return replace(self, catalogue=catalogue)

    def adapter_may_fail(self, source: AdapterSource) -> bool:
        """Whether ``source`` is left out, rather than stop the start, if it cannot be offered."""
        return self.adapters_may_fail or source.from_folder or source.withdrawn

    def with_adapter(self, source: AdapterSource) -> Self:
        """The configuration after ``source`` was offered, in place of one of the same name."""
        others = [each for each in self.adapters if each.id != source.id]
        return replace(self, adapters=(*others, source))

    def without_adapter(self, id: str) -> Self:
        """The configuration after the adapter ``id`` was withdrawn."""
        return replace(
            self,
            adapters=tuple(
                replace(each, withdrawn=True) if each.id == id else each for each in self.adapters
            ),
        )

    def with_correction(self, correction: Correction) -> Self:
        """The configuration after the engine has corrected what was measured."""
        return replace(
            self,
            previous_measurements=tuple(
                correction.of(info) if info.id == correction.model else info
                for info in self.previous_measurements
            ),
        )
