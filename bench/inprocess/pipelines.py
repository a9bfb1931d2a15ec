"""diffusers' own ``pipe()``, for one request at a time or for batches of equal settings."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import torch
import transformers

from bench.inprocess.batching import serve_batches
from bench.inprocess.compiled_unet import use_compiled
from bench.workload.arrivals import Answer, Arrivals
from bench.workload.requests import NO_OPTIONS, Request
from darkroom_server.core.model_runtime import ModelRuntime
from darkroom_server.engine.output.formats import PNG_COMPRESSION
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.presets import allowed_threads

DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float16", "bfloat16", "float32")}


def load_pipeline(folder: str, runtime: ModelRuntime) -> Any:
    """The pipeline of ``folder`` as its users load it, with the engine's dtype and layouts."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if runtime.device == "cpu":
        torch.set_num_threads(allowed_threads())
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[runtime.dtype])
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    pipeline.to(runtime.device)
    if runtime.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
    if runtime.vae_channels_last:
        pipeline.vae.to(memory_format=torch.channels_last)
    if runtime.slice_size:
        size = runtime.slice_size
        pipeline.enable_attention_slicing(int(size) if size.isdigit() else size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class WallClock:
    """Seconds since the clock was created."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def wait_until(self, moment: float) -> None:
        """Sleep until ``moment``."""
        time.sleep(max(0.0, moment - self.now()))


class Pipelines:
    """Calls ``pipe()`` for at most ``max_images`` images, on the thread that created it.

    ``options`` are further arguments of each call. ``compiled`` is the file of a compiled UNet, ""
    for the eager one.
    """

    def __init__(
        self,
        folder: str,
        runtime: ModelRuntime,
        max_images: int,
        options: Mapping[str, Any] = NO_OPTIONS,
        compiled: str = "",
    ) -> None:
        self._pipeline = load_pipeline(folder, runtime)
        if compiled:
            memory_format = MemoryFormat(DTYPES[runtime.dtype], runtime.channels_last)
            use_compiled(self._pipeline, compiled, memory_format)
        self._runtime = runtime
        self._max_images = max_images
        self._options = options

    def serve(self, arrivals: Arrivals) -> list[Answer]:
        """See ``ArrivalServer``."""
        return serve_batches(arrivals, WallClock(), self._generate, self._max_images)

    def batch_times(self) -> list[tuple[int, float]]:
        """Empty: the pipeline does not report them."""
        return []

    def close(self) -> None:
        """Nothing to stop."""

    def images(self, batch: Sequence[Request]) -> list[bytes]:
        """The PNG files of ``batch``, whose settings are equal, in its order, from one call."""
        seeds = [request.seed + i for request in batch for i in range(request.images)]
        with precision(self._runtime):
            images = self._pipeline(
                [request.prompt for request in batch for _ in range(request.images)],
                num_inference_steps=batch[0].steps,
                guidance_scale=batch[0].guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                **{"width": batch[0].width, "height": batch[0].height, **self._options},
            ).images
        return [png(image) for image in images]

    def _generate(self, batch: list[Request]) -> None:
        self.images(batch)


def precision(runtime: ModelRuntime) -> AbstractContextManager[Any]:
    """The context of a call of a pipeline: autocast, if the engine uses it."""
    if not runtime.autocast:
        return nullcontext()
    half = torch.float16 if runtime.device.startswith("cuda") else torch.bfloat16
    weights = DTYPES[runtime.dtype]
    return torch.autocast(
        runtime.device.split(":")[0], half if weights == torch.float32 else weights
    )


def png(image: Any) -> bytes:
    """The PNG file of one of a pipeline's images."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def make_pipelines(
    folder: str, runtime: ModelRuntime, max_images: int, options: Mapping[str, Any] = NO_OPTIONS
) -> tuple[Pipelines, None]:
    """For ``Remote``."""
    return Pipelines(folder, runtime, max_images, options), None
