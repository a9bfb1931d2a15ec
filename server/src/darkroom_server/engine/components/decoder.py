"""Latents to pixels, one image at a time."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def pixels_of(unit: torch.Tensor) -> NDArray[np.uint8]:
    """``unit`` [3, height, width], 0 to 1, as bytes [height, width, 3].

    Computed where ``unit`` is, because a byte is a quarter of what the host would get otherwise.
    """
    rounded = (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = rounded.contiguous().cpu().numpy()
    return pixels


class Decoder:
    """Decodes with a pipeline's VAE; if values are not finite, decodes again in float32.

    If memory runs out, it decodes again, and then by tiles, which changes pixels. ``tiled`` says
    whether the last decode came to that.
    """

    def __init__(self, vae: Any, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        self.counts = Counts()
        self.tiled = False
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
        return pixels_of((image[0] * 0.5 + 0.5).clamp(0, 1))

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
            image = self._decode_in_memory(latents, options)
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

    def _decode_in_memory(self, latents: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Decode: as a whole, again with the memory that torch keeps, then by tiles."""
        self.tiled = False
        for by_tiles in (False, False, True):
            try:
                with _tiles(self._vae, latents) if by_tiles else nullcontext():
                    image = self._decode(latents, **options)
            except Exception as error:
                if by_tiles or not is_out_of_memory(error):
                    raise
                why = str(error)
            else:
                self.tiled = by_tiles
                return image
            # Outside the handler: the error's traceback keeps the failed call's tensors alive.
            log.warning("decode ran out of memory, trying again", why=why)
            if latents.device.type == "cuda":
                torch.cuda.empty_cache()
        raise AssertionError("the last try returns or raises")

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


@contextmanager
def _tiles(vae: Any, latents: torch.Tensor) -> Iterator[None]:
    """Let ``vae`` decode ``latents`` by tiles of about half of them on each side.

    Raises ``MemoryError`` for a VAE that cannot, or that does already.
    """
    if getattr(vae, "use_tiling", True):
        raise MemoryError("the VAE has no smaller tiles")
    names = [
        name for name in ("tile_latent_min_size", "tile_sample_min_size") if hasattr(vae, name)
    ]
    before = {name: getattr(vae, name) for name in names}
    vae.use_tiling = True
    if len(names) == 2:
        # A multiple of four: tiles overlap by a quarter, and must meet.
        latent_size = max(4, max(latents.shape[-2:]) // 8 * 4)
        factor = before["tile_sample_min_size"] // before["tile_latent_min_size"]
        vae.tile_latent_min_size = latent_size
        vae.tile_sample_min_size = latent_size * factor
    try:
        yield
    finally:
        vae.use_tiling = False
        for name, value in before.items():
            setattr(vae, name, value)
