"""Adapters with random weights, and the two ways to group a batch by adapter."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters.weights import Mix, mix_of

RANK = 8
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def write_adapters(folder: Path, pipeline: Any, count: int) -> list[AdapterSource]:
    """Attention adapters with random weights for the UNet."""
    sources = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        state: dict[str, torch.Tensor] = {}
        for name, layer in _attention(pipeline.unet):
            outputs, inputs = layer.weight.shape
            down = 0.05 * torch.randn(RANK, inputs, generator=generator)
            state[f"unet.{name}.lora_A.weight"] = down
            up = 0.05 * torch.randn(outputs, RANK, generator=generator)
            state[f"unet.{name}.lora_B.weight"] = up
        file = folder / f"lora-{index}.safetensors"
        safetensors.torch.save_file(state, file)
        sources.append(AdapterSource(id=f"lora-{index}", location=str(file)))
    return sources


def _attention(unet: Any) -> list[tuple[str, Any]]:
    layers = [(n, part) for n, part in unet.named_modules() if isinstance(part, nn.Linear)]
    return [(name, layer) for name, layer in layers if name.endswith(ATTENTION)]


class GroupedAdapters:
    """In place of an engine's own: rows of a batch have one adapter, which a switch brings in.

    It is the store of the engine too: every adapter is in memory, and none is ever ``unwanted``.
    """

    unwanted: frozenset[str] = frozenset()

    def __init__(self, switch: Callable[[str | None], None]) -> None:
        self._switch = switch
        self._current: str | None = None

    def request(self, job: Job) -> bool:
        """Nothing has to be read."""
        return True

    def close(self) -> None:
        """Nothing to end."""

    def group_key(self, job: Job) -> Mix:
        """Only rows with the same adapter share a batch."""
        return mix_of(job)

    def encoder_mix(self, job: Job) -> Mix:
        """No adapter changes the prompts."""
        return ()

    @contextlib.contextmanager
    def denoising(self, jobs: Sequence[tuple[Job, int]]) -> Iterator[None]:
        """Switch to the adapter of ``jobs`` first, unless it is there."""
        (wanted,) = {next((id for id, _ in mix_of(job)), None) for job, _ in jobs}
        if wanted != self._current:
            self._switch(wanted)
            self._current = wanted
        yield

    @contextlib.contextmanager
    def encoding(self, mix: Mix) -> Iterator[None]:
        """Nothing to do."""
        yield


def peft_switch(pipeline: Any, sources: Sequence[AdapterSource]) -> Callable[[str | None], None]:
    """``set_adapters`` for each switch."""
    for source in sources:
        pipeline.load_lora_weights(source.location, adapter_name=source.id)
    pipeline.unet.to(pipeline.unet.dtype)

    def switch(id: str | None) -> None:
        pipeline.set_adapters([id])

    return switch


def fused_switch(pipeline: Any, sources: Sequence[AdapterSource]) -> Callable[[str | None], None]:
    """The weights of each adapter, multiplied out and added to the model's, swapped in."""
    layers = dict(_attention(pipeline.unet))
    copies: dict[str, dict[str, torch.Tensor]] = {}
    for source in sources:
        state = safetensors.torch.load_file(source.location)
        copies[source.id] = {
            name: (
                layer.weight.float()
                + state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
            ).to(layer.weight.dtype)
            for name, layer in layers.items()
        }

    def switch(id: str | None) -> None:
        assert id is not None
        for name, weight in copies[id].items():
            layers[name].weight.data = weight

    return switch
