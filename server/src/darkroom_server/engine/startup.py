"""From a configuration to a loop that is ready to run: load, arrange, warm up, measure."""

import time
from collections.abc import Callable
from typing import Any

import structlog
import torch

from darkroom_server.core.config import Attention, EngineConfig, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import EngineReady, Event
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model import (
    MemoryNeeds,
    ModelDefaults,
    ModelInfo,
    ModelLimits,
    ModelRuntime,
)
from darkroom_server.engine.decoder import Decoder
from darkroom_server.engine.denoiser import Denoiser
from darkroom_server.engine.loading import SUPPORTED, load_pipeline, revision_of
from darkroom_server.engine.loop import EngineLoop
from darkroom_server.engine.measure import (
    ROWS,
    DenoiserPass,
    Form,
    best_rows,
    fastest_form,
    peak_bytes,
)
from darkroom_server.engine.memory import available_bytes
from darkroom_server.engine.model import LoadedModel
from darkroom_server.engine.prompts import PromptEncoder
from darkroom_server.engine.runtime import Runtime, allowed_threads, resolve
from darkroom_server.engine.schedulers import name_of, offers

log = structlog.get_logger(__name__)

DEFAULT_STEPS = 30
DEFAULT_GUIDANCE = 7.5


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
    with torch.inference_mode():
        models = {source.id: load_model(source, runtime, config) for source in config.models}
    infos = tuple(model.info for model in models.values())
    return EngineLoop(models, emit), EngineReady(infos, time.monotonic() - began)


def load_model(source: ModelSource, runtime: Runtime, config: EngineConfig) -> LoadedModel:
    """The model of ``source``, on its device, warmed up and measured. Raises ``StartupError``."""
    pipeline = load_pipeline(
        source, runtime.dtype or torch.float32, safety_checker=config.safety_checker
    )
    unet, vae = pipeline.unet, pipeline.vae
    if unet.config.time_cond_proj_dim is not None:
        raise StartupError(
            f"model {source.location!r} is guidance-distilled, which is not supported"
        )
    tokens = int(pipeline.tokenizer.model_max_length)
    form = _arrange(pipeline, runtime, tokens)

    def precision() -> Any:
        return runtime.precision(form.dtype)

    prompts = PromptEncoder(pipeline.tokenizer, pipeline.text_encoder, form.dtype, precision)
    denoiser = Denoiser(unet, max_rows=2, precision=precision, channels_last=form.channels_last)
    decoder = Decoder(vae, precision)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = int(unet.config.sample_size) * factor
    run_pass = _unet_pass(unet, form, runtime, tokens)
    memory = _measure_memory(run_pass, unet, decoder, form, runtime, factor)
    most = min(memory.rows_that_fit(size, size), config.max_rows or max(ROWS))
    denoiser.max_rows = best_rows(run_pass, most)
    scheduler = name_of(pipeline.scheduler)
    if scheduler is None:
        scheduler = SchedulerName.DDIM
        log.warning(
            "the model's own scheduler is not offered",
            scheduler=type(pipeline.scheduler).__name__,
            default=scheduler,
        )
    info = ModelInfo(
        id=source.id,
        revision=revision_of(source, pipeline),
        kind=SUPPORTED,
        defaults=ModelDefaults(
            width=size,
            height=size,
            steps=DEFAULT_STEPS,
            guidance_scale=DEFAULT_GUIDANCE,
            scheduler=scheduler,
        ),
        limits=ModelLimits(
            min_size=max(8 * factor, size // 2),
            max_size=size * 2,
            size_multiple=factor,
            prompt_tokens=prompts.tokens,
            max_rows=denoiser.max_rows,
        ),
        schedulers=offers(dict(pipeline.scheduler.config)),
        runtime=_describe(runtime, form, safety_checker=config.safety_checker),
        memory=memory,
    )
    log.info(
        "model loaded",
        model=info.id,
        revision=info.revision,
        max_rows=denoiser.max_rows,
        bytes_per_row=memory.bytes_per_row,
        bytes_per_decode=memory.bytes_per_decode,
    )
    return LoadedModel(
        info=info,
        prompts=prompts,
        denoiser=denoiser,
        decoder=decoder,
        scheduler_config=dict(pipeline.scheduler.config),
        latent_channels=int(unet.config.in_channels),
        latent_factor=factor,
        device=runtime.device,
        dtype=form.dtype,
    )


def _arrange(pipeline: Any, runtime: Runtime, tokens: int) -> Form:
    """Put the pipeline on its device in the form that the knobs, or its own speed, ask for."""
    if runtime.attention is Attention.SLICED:
        size = runtime.slice_size
        pipeline.enable_attention_slicing(int(size) if size.isdigit() else size)
    if runtime.vae_tiling:
        pipeline.vae.enable_tiling()
    # Never float16 where nothing was said: on a CPU it is hundreds of times slower.
    dtypes = [runtime.dtype] if runtime.dtype else [torch.float32, torch.bfloat16]
    layouts = [False, True] if runtime.channels_last is None else [runtime.channels_last]
    form = fastest_form(
        pipeline.unet,
        [Form(dtype, layout) for dtype in dtypes for layout in layouts],
        lambda unet, form: _unet_pass(unet, form, runtime, tokens),
    )
    pipeline.to(device=runtime.device, dtype=form.dtype)
    if form.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if runtime.fp8_storage:
        pipeline.unet.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=form.dtype
        )
    return form


def _unet_pass(unet: Any, form: Form, runtime: Runtime, tokens: int) -> DenoiserPass:
    """A pass over zeros: what it computes does not matter, what it costs does."""
    latent = int(unet.config.sample_size)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format

    def run_pass(rows: int) -> None:
        shape = (rows, unet.config.in_channels, latent, latent)
        latents = torch.zeros(shape, dtype=form.dtype, device=runtime.device)
        context = torch.zeros(
            (rows, tokens, unet.config.cross_attention_dim), dtype=form.dtype, device=runtime.device
        )
        with runtime.precision(form.dtype):
            unet(
                latents.contiguous(memory_format=layout),
                torch.zeros(rows, device=runtime.device),
                encoder_hidden_states=context,
            )
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    return run_pass


def _measure_memory(
    run_pass: DenoiserPass,
    unet: Any,
    decoder: Decoder,
    form: Form,
    runtime: Runtime,
    factor: int,
) -> MemoryNeeds:
    latent = int(unet.config.sample_size)
    shape = (1, int(unet.config.in_channels), latent, latent)
    latents = torch.zeros(shape, dtype=form.dtype, device=runtime.device)
    pass_peak = peak_bytes(runtime.device, lambda: run_pass(2))
    decode_peak = peak_bytes(runtime.device, lambda: decoder.decode(latents))
    return MemoryNeeds(
        pixels=(latent * factor) ** 2,
        bytes_per_row=pass_peak // 2,
        bytes_per_decode=decode_peak,
        available_bytes=available_bytes(runtime.device),
    )


def _describe(runtime: Runtime, form: Form, *, safety_checker: bool) -> ModelRuntime:
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
