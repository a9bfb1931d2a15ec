"""Seconds of one forward pass of a UNet, one decode and one prompt, in every usual form."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

ROWS = (2, 4, 8, 16, 32)
REPEATS = 5
COMPILED = "compiled"
"""The form that takes minutes before its first call."""

TIMESTEP = 500.0

Pass = Callable[[int], Callable[[], Any]]
"""Prepares a forward pass of a number of rows; the function that it returns runs it once."""


def eager(unet: Any) -> Pass:
    """Diffusers before fused attention: a matrix of all queries by all keys."""
    unet.set_attn_processor(AttnProcessor())
    return _plain(unet, torch.contiguous_format)


def sdpa(unet: Any) -> Pass:
    """With torch's fused attention."""
    unet.set_attn_processor(AttnProcessor2_0())
    return _plain(unet, torch.contiguous_format)


def channels_last(unet: Any) -> Pass:
    """With fused attention and channels last in memory."""
    unet.set_attn_processor(AttnProcessor2_0())
    unet.to(memory_format=torch.channels_last)
    return _plain(unet, torch.channels_last)


def sliced(unet: Any) -> Pass:
    """As the preset ``frugal`` runs it: attention in slices, under autocast."""
    unet.set_attention_slice("auto")
    run = _plain(unet, torch.contiguous_format)
    half = None if unet.dtype == torch.float32 else unet.dtype

    def ready(rows: int) -> Callable[[], Any]:
        call = run(rows)

        def under_autocast() -> Any:
            with torch.autocast(unet.device.type, dtype=half):
                return call()

        return under_autocast

    return ready


def compiled(unet: Any) -> Pass:
    """``channels_last``, by ``torch.compile`` for each number of rows."""
    channels_last(unet)
    # Compile for each number of rows: a dynamic shape would be slower.
    return _plain(torch.compile(unet, dynamic=False), torch.channels_last)


def graphs(unet: Any) -> Pass:
    """``channels_last``, captured in a CUDA graph for each number of rows."""
    run = channels_last(unet)

    def ready(rows: int) -> Callable[[], Any]:
        step = run(rows)
        # Warm up on another stream first: a graph must not capture the libraries' lazy set-up.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return partial(_replay, graph, step)

    return ready


FORMS: Mapping[str, Callable[[Any], Pass]] = {
    "eager": eager,
    "SDPA": sdpa,
    "channels last": channels_last,
    "sliced, autocast": sliced,
    "CUDA graphs": graphs,
    COMPILED: compiled,
}
"""The forms by name; each needs a newly loaded UNet."""


@torch.inference_mode()
def pass_seconds(form: Pass, rows: Sequence[int], repeats: int = REPEATS) -> dict[int, float]:
    """Median seconds by the number of rows; omits what does not fit in memory."""
    found = {}
    for count in rows:
        try:
            found[count] = seconds_of(form(count), repeats)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
    return found


@torch.inference_mode()
def decode_seconds(vae: Any, latents: torch.Tensor, repeats: int = REPEATS) -> float:
    """Median seconds to decode ``latents`` [images, channels, h, w]."""
    return seconds_of(lambda: vae.decode(latents), repeats)


@torch.inference_mode()
def encode_seconds(text_encoder: Any, prompts: int, repeats: int = REPEATS) -> float:
    """Median seconds to encode ``prompts`` of full length."""
    config = text_encoder.config
    shape = (prompts, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(text_encoder.device)
    return seconds_of(lambda: text_encoder(tokens), repeats)


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``repeats`` synchronized calls, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        _synchronize()
        began = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _replay(graph: torch.cuda.CUDAGraph, inputs: Callable[[], Any]) -> None:
    """Run ``graph``, which reads the tensors that ``inputs`` keeps alive."""
    graph.replay()


def _plain(unet: Any, layout: torch.memory_format) -> Pass:
    def ready(rows: int) -> Callable[[], Any]:
        config, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
        side = config.sample_size
        latents = torch.randn((rows, config.in_channels, side, side), **like)
        latents = latents.to(memory_format=layout)
        prompts = torch.randn((rows, 77, config.cross_attention_dim), **like)
        timesteps = torch.full((rows,), TIMESTEP, device=unet.device)
        return lambda: unet(latents, timesteps, prompts, return_dict=False)

    return ready


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
