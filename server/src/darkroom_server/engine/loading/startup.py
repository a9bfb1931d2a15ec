"""From a configuration to a loop that is ready to run: load, arrange, warm up, measure."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import structlog
import torch

from darkroom_server.core.engine_config import Dtype, EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineReady, Event, ModelLoad
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import (
    ModelDefaults,
    ModelInfo,
    ModelLimits,
    ModelRuntime,
    ModelSpeed,
)
from darkroom_server.engine.components.decoder import Decoder
from darkroom_server.engine.components.denoiser import Denoiser
from darkroom_server.engine.components.previewer import Previewer
from darkroom_server.engine.components.prompt_encoder import PromptEncoder
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.components.schedulers import name_of, offers
from darkroom_server.engine.device.memory import available_bytes
from darkroom_server.engine.failures import is_out_of_memory
from darkroom_server.engine.families.stable_diffusion import LoadedModel
from darkroom_server.engine.loading.defaults import Defaults, read_defaults
from darkroom_server.engine.loading.folder import SUPPORTED
from darkroom_server.engine.loading.pipeline import load_pipeline, weights_of
from darkroom_server.engine.loading.revision import UNKNOWN, revision_of
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.engine.warmup.placement import (
    arrange,
    denoiser_forward,
    measure_decode,
    measure_memory,
)
from darkroom_server.engine.warmup.presets import DTYPES, Runtime, allowed_threads, resolve
from darkroom_server.engine.warmup.profiler import ROWS, MemoryFormat, best_rows, measure_rows

log = structlog.get_logger(__name__)


def start_loop(
    config: EngineConfig, emit: Callable[[Event], None]
) -> tuple[EngineLoop, EngineReady]:
    """Load every model; must be called on the thread that will run the loop.

    Raises ``StartupError`` with one line for the operator.
    """
    began = time.monotonic()
    runtime = resolve(config)
    if runtime.device.type == "cpu":
        torch.set_num_threads(config.threads or allowed_threads())
    else:
        # Events go to the current device: left at the first, this engine would use that one too.
        torch.cuda.set_device(runtime.device)
    models, loads = {}, []
    for source in config.models:
        try:
            with torch.inference_mode():
                models[source.id], load = load_model(source, runtime, config)
            loads.append(load)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory", model=source.id, why=str(error))
            raise StartupError(
                f"model {source.location!r} does not fit the memory of {runtime.device}: use "
                "--preset tiny, or fewer models"
            ) from error
    if len(models) > 1:
        _share_memory(models.values(), config, runtime)
    infos = tuple(model.info for model in models.values())
    seconds = time.monotonic() - began
    return EngineLoop(models, emit), EngineReady(infos, seconds, tuple(loads))


def _share_memory(models: Iterable[LoadedModel], config: EngineConfig, runtime: Runtime) -> None:
    """Let each model know of the memory that those that were loaded after it take."""
    previous_measurements = {info.id for info in config.previous_measurements}
    available = available_bytes(runtime.device)
    for model in models:
        if model.info.id not in previous_measurements:
            memory = replace(model.info.memory, available_bytes=available)
            model.info = replace(model.info, memory=memory)


def load_model(
    source: ModelSource, runtime: Runtime, config: EngineConfig
) -> tuple[LoadedModel, ModelLoad]:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``."""
    began = time.monotonic()
    previous_measurements = next(
        (info for info in config.previous_measurements if info.id == source.id), None
    )
    if previous_measurements is not None and previous_measurements.revision != UNKNOWN:
        source = replace(
            source, revision=previous_measurements.revision
        )  # The hub may have moved on.
    pipeline = load_pipeline(
        source, runtime.dtype or torch.float32, safety_checker=config.safety_checker
    )
    in_memory = time.monotonic()
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise StartupError(f"model {source.location!r} is guidance-distilled: not supported")
    safety = _safety_checker(pipeline, source) if config.safety_checker else None
    tokens = int(pipeline.tokenizer.model_max_length)
    form = arrange(pipeline, runtime, tokens, _form_of(previous_measurements))

    def precision() -> AbstractContextManager[Any]:
        return runtime.precision(form.dtype)

    decoder = Decoder(pipeline.vae, precision)
    forward = denoiser_forward(pipeline.unet, form, runtime, tokens)
    factor = int(pipeline.vae_scale_factor)
    if previous_measurements is None:
        memory = measure_memory(forward, pipeline.unet, decoder, form, runtime, factor)
        fit = memory.rows_that_fit(*[int(pipeline.unet.config.sample_size) * factor] * 2)
        passes = measure_rows(forward, min(fit, config.max_rows or max(ROWS)))
        max_rows = best_rows(passes)
        decode = measure_decode(pipeline.unet, decoder, form, runtime)
        speed = ModelSpeed(passes=tuple(passes.items()), decode=decode)
    else:
        memory, max_rows, speed = (
            previous_measurements.memory,
            previous_measurements.limits.max_rows,
            previous_measurements.speed,
        )
        forward(2)
    info = ModelInfo(
        id=source.id,
        revision=revision_of(source, pipeline),
        kind=SUPPORTED,
        defaults=_defaults(read_defaults(source), pipeline, factor),
        limits=_limits(pipeline, factor, tokens, max_rows),
        schedulers=offers(dict(pipeline.scheduler.config)),
        runtime=_describe(runtime, form, safety_checker=config.safety_checker),
        memory=memory,
        speed=speed,
    )
    log.info(
        "model loaded",
        model=info.id,
        revision=info.revision,
        device=info.runtime.device,
        dtype=info.runtime.dtype,
        preset=info.runtime.preset,
        max_rows=max_rows,
        bytes_per_row=memory.bytes_per_row,
        bytes_per_decode=memory.bytes_per_decode,
    )
    load = ModelLoad(
        model=info.id,
        load_seconds=in_memory - began,
        warm_up_seconds=time.monotonic() - in_memory,
        bytes_by_component=weights_of(pipeline),
    )
    loaded = LoadedModel(
        info=info,
        prompts=PromptEncoder(pipeline.tokenizer, pipeline.text_encoder, form.dtype, precision),
        denoiser=Denoiser(
            pipeline.unet,
            max_rows=max_rows,
            precision=precision,
            channels_last=form.channels_last,
        ),
        decoder=decoder,
        previewer=Previewer(pipeline.vae, precision, factor),
        safety=safety,
        scheduler_config=dict(pipeline.scheduler.config),
        latent_channels=int(pipeline.unet.config.in_channels),
        latent_factor=factor,
        device=runtime.device,
        dtype=form.dtype,
    )
    return loaded, load


def _form_of(previous_measurements: ModelInfo | None) -> MemoryFormat | None:
    if previous_measurements is None:
        return None
    return MemoryFormat(
        DTYPES[Dtype(previous_measurements.runtime.dtype)],
        previous_measurements.runtime.channels_last,
    )


def _defaults(given: Defaults, pipeline: Any, factor: int) -> ModelDefaults:
    scheduler = name_of(pipeline.scheduler)
    if scheduler is None:
        scheduler = SchedulerName.DDIM
        log.warning(
            "the model's own scheduler is not offered",
            scheduler=type(pipeline.scheduler).__name__,
            default=scheduler,
        )
    size = int(pipeline.unet.config.sample_size) * factor
    return ModelDefaults(
        width=size,
        height=size,
        steps=given.steps,
        guidance_scale=float(given.guidance_scale),
        scheduler=scheduler,
    )


def _limits(pipeline: Any, factor: int, tokens: int, max_rows: int) -> ModelLimits:
    size = int(pipeline.unet.config.sample_size) * factor
    return ModelLimits(
        # Half and twice the size that the model was trained at: beyond, pictures fall apart.
        min_size=max(8 * factor, size // 2),
        max_size=size * 2,
        size_multiple=factor,
        prompt_tokens=tokens,
        max_rows=max_rows,
    )


def _safety_checker(pipeline: Any, source: ModelSource) -> SafetyChecker:
    if pipeline.safety_checker is None or pipeline.feature_extractor is None:
        raise StartupError(
            f"model {source.location!r} brings no safety checker: leave --safety-checker out"
        )
    return SafetyChecker(pipeline.safety_checker, pipeline.feature_extractor)


def _describe(runtime: Runtime, form: MemoryFormat, *, safety_checker: bool) -> ModelRuntime:
    return ModelRuntime(
        device=str(runtime.device),
        dtype=str(form.dtype).removeprefix("torch."),
        preset=runtime.preset,
        attention=runtime.attention,
        slice_size=runtime.slice_size,
        autocast=runtime.autocast,
        vae_tiling=runtime.vae_tiling,
        channels_last=form.channels_last,
        fp8_storage=runtime.fp8_storage,
        safety_checker=safety_checker,
    )
