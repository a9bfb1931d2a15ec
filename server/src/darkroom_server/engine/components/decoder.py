"""Latents to pixels, one image at a time."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from darkroom_server.core.errors import Failure
from darkroom_server.core.events import Counted
from darkroom_server.engine.counters import Counts
from darkroom_server.engine.failures import (
    DECODE_FAILED,
    NON_FINITE,
    OUT_OF_MEMORY,
    is_fatal,
    is_out_of_memory,
)

log = structlog.get_logger(__name__)

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Decoder:
    """Decodes with a pipeline's VAE; if values are not finite, decodes again in float32."""

    def __init__(self, vae: Any, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self.counts = Counts()
        self._vae = vae
        self.precision = precision

    @property
    def tile_pixels(self) -> int | None:
        """The pixels of a tile, None if images are decoded whole."""
        if not getattr(self._vae, "use_tiling", False):
            return None
        return int(self._vae.tile_sample_min_size) ** 2

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8] | Failure:
        """The pixels of ``latents`` [1, channels, h, w]: [height, width, 3], 0 to 255.

        Raises an error that means that the device is lost.
        """
        image = self.decode_scaled(latents, divisor=self._vae.config.scaling_factor)
        if isinstance(image, Failure):
            return image
        # The arithmetic of diffusers' VaeImageProcessor, for equal values.
        unit = (image[0].cpu() * 0.5 + 0.5).clamp(0, 1)
        pixels = unit.permute(1, 2, 0).float().numpy()
        return (pixels * 255).round().astype(np.uint8)

    def decode_scaled(
        self,
        latents: torch.Tensor,
        options: Mapping[str, Any] = NO_OPTIONS,
        *,
        divisor: float | None = None,
    ) -> torch.Tensor | Failure:
        """What the VAE makes of ``latents``: values of -1 to 1.

        ``latents`` have the VAE's own scale, or get it by ``divisor``. ``options`` are further
        arguments of the VAE's decode. Raises an error that means that the device is lost.
        """
        try:
            if divisor is not None:
                latents = latents / divisor
            image = self._decode(latents, **options)
            if not torch.isfinite(image).all():
                log.warning("decode was not finite, trying float32")
                image = self._decode_float32(latents, **options)
                if not torch.isfinite(image).all():
                    self.counts[Counted.NON_FINITE_FAILED] += 1
                    return NON_FINITE
                self.counts[Counted.NON_FINITE_RECOVERED] += 1
            return image
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                log.warning("decode ran out of memory", why=str(error))
                self.counts[Counted.OUT_OF_MEMORY_FAILED] += 1
                return OUT_OF_MEMORY
            log.exception("decode failed")
            return DECODE_FAILED

    def _decode(self, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        with self.precision():
            # Some VAEs decode numbers of codes, which stay integers.
            given = latents.to(self._vae.dtype) if latents.is_floating_point() else latents
            return self._vae.decode(given, return_dict=False, **options)[0]  # type: ignore[no-any-return]

    def _decode_float32(self, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        # A copy: if memory runs out, the served weights must not stay half converted. The encoder
        # is a third of the weights and is not needed.
        encoder = getattr(self._vae, "encoder", None)
        parts = {} if encoder is None else {id(encoder): torch.nn.Identity()}
        vae = copy.deepcopy(self._vae, parts).to(dtype=torch.float32)
        with torch.autocast(latents.device.type, enabled=False):
            # The class's function: an instance may have one that decodes with the original.
            given = latents.float() if latents.is_floating_point() else latents
            return type(vae).decode(vae, given, return_dict=False, **options)[0]  # type: ignore[no-any-return]
