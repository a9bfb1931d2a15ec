"""The rivals: diffusers' own ``pipe()``, one call at a time or on batches of equal settings."""

import io
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import torch
import transformers

from bench.arrivals import Arrivals, Drawn
from bench.batching import serve
from bench.workload import Request
from darkroom_server.core.model import ModelRuntime
from darkroom_server.engine.output.formats import PNG_COMPRESSION
from darkroom_server.engine.warmup.presets import allowed_threads

DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float16", "bfloat16", "float32")}


def load_pipeline(folder: str, runtime: ModelRuntime) -> Any:
    """The pipeline of ``folder`` as its users would load it, in the engine's form."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if runtime.device == "cpu":
        torch.set_num_threads(allowed_threads())
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=DTYPES[runtime.dtype], safety_checker=None, requires_safety_checker=False
    )
    pipeline.to(runtime.device)
    if runtime.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if runtime.slice_size:
        size = runtime.slice_size
        pipeline.enable_attention_slicing(int(size) if size.isdigit() else size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class WallClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def wait_until(self, moment: float) -> None:
        """Sleep until ``moment``."""
        time.sleep(max(0.0, moment - self.now()))


class Pipelines:
    """Calls ``pipe()`` for at most ``most`` requests at once, on the thread that made it."""

    def __init__(self, folder: str, runtime: ModelRuntime, most: int) -> None:
        self._pipeline = load_pipeline(folder, runtime)
        self._runtime = runtime
        self._most = most

    def draw(self, arrivals: Arrivals) -> list[Drawn]:
        """Serve ``arrivals``."""
        return serve(arrivals, WallClock(), self._draw, self._most)

    def passes(self) -> list[tuple[int, float]]:
        """None: the pipeline's loop is its own."""
        return []

    def close(self) -> None:
        """Nothing is left to stop."""

    def images(self, batch: Sequence[Request]) -> list[bytes]:
        """The PNG files of requests with equal settings, by one call."""
        with self._precision():
            images = self._pipeline(
                [request.prompt for request in batch],
                num_inference_steps=batch[0].steps,
                guidance_scale=batch[0].guidance_scale,
                width=batch[0].width,
                height=batch[0].height,
                generator=[torch.Generator("cpu").manual_seed(r.seed) for r in batch],
            ).images
        return [_png(image) for image in images]

    def _draw(self, batch: list[Request]) -> None:
        self.images(batch)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self._runtime.autocast:
            return nullcontext()
        half = torch.float16 if self._runtime.device.startswith("cuda") else torch.bfloat16
        weights = DTYPES[self._runtime.dtype]
        return torch.autocast(
            self._runtime.device.split(":")[0], half if weights == torch.float32 else weights
        )


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def make_pipelines(folder: str, runtime: ModelRuntime, most: int) -> tuple[Pipelines, None]:
    """For ``contender.Remote``."""
    return Pipelines(folder, runtime, most), None
