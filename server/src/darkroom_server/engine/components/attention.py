"""Sliced attention whose slices get finer with the size of the images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

from darkroom_server.core.model import MemoryNeeds, heads_of_slice

log = structlog.get_logger(__name__)


class SlicedAttention:
    """The attention layers of a denoiser that diffusers slices; of none with None.

    A slice of a large image has fewer heads than one of the default size, down to one, so that its
    scores take no more memory. If that is not enough, SDPA takes the place of slices: its memory
    grows with the pixels, not with their square.
    """

    def __init__(self, denoiser: Any) -> None:
        modules = () if denoiser is None else denoiser.modules()
        self._layers: list[tuple[Any, SlicedAttnProcessor, int]] = [
            (module, module.processor, module.processor.slice_size)
            for module in modules
            if isinstance(getattr(module, "processor", None), SlicedAttnProcessor)
        ]
        self._sdpa = AttnProcessor2_0()
        self._logged: set[tuple[int, int]] = set()
        self._out_of_memory: set[tuple[int, int]] = set()

    @property
    def heads_per_slice(self) -> int:
        """The heads in a slice of the default size, of the layer with the fewest; 0: no layers."""
        return min((heads for *_, heads in self._layers), default=0)

    def fit(self, needs: MemoryNeeds, width: int, height: int) -> bool:
        """Set the layers up for images of this size; returns whether they use SDPA now."""
        uses_sdpa = self._uses_sdpa(needs, width, height)
        if uses_sdpa and (width, height) not in self._logged:
            self._logged.add((width, height))
            log.warning(
                "attention is sdpa for this size: no slice is fine enough for the memory",
                width=width,
                height=height,
                available_bytes=needs.available_bytes,
            )
        scale = width * height / needs.pixels
        for layer, sliced, heads in self._layers:
            layer.processor = self._sdpa if uses_sdpa else sliced
            sliced.slice_size = heads_of_slice(heads, scale)
        return uses_sdpa

    def replace_slices(self, needs: MemoryNeeds, width: int, height: int) -> bool:
        """Let images of this size run with SDPA from now on: a batch of them had no memory.

        Returns False if they do already, or if SDPA needs no less.
        """
        if self._uses_sdpa(needs, width, height) or not needs.sdpa_saves(width, height):
            return False
        self._out_of_memory.add((width, height))
        return True

    def _uses_sdpa(self, needs: MemoryNeeds, width: int, height: int) -> bool:
        return (width, height) in self._out_of_memory or needs.uses_sdpa(width, height)

    @contextmanager
    def replaced_by_sdpa(self) -> Iterator[None]:
        """Run without slices, for measurements."""
        for layer, *_ in self._layers:
            layer.processor = self._sdpa
        try:
            yield
        finally:
            for layer, sliced, _ in self._layers:
                layer.processor = sliced
