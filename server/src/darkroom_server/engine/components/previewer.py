"""What unfinished latents look like, without the VAE's time: one linear map from latents to RGB.

The map is fitted to the model's own VAE, by least squares: its encoder tells the latents of some
coloured pictures, and each latent pixel answers for the mean colour of the patch that it stands
for. On the demo model it explains nine tenths of the colours' variance.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from darkroom_server.engine.failures import is_fatal, is_out_of_memory

log = structlog.get_logger(__name__)

CELLS = (1, 2, 4, 8)
"""Fields of one colour along a side of the pictures that the map is fitted to."""

PICTURES_PER_CELL = 4
PICTURE_LATENTS = 8
"""Their size, in latent pixels: 1024 of these in all."""


class Previewer:
    """Paints latents of one model; the map is fitted when the first preview is asked for."""

    def __init__(
        self, vae: Any, precision: Callable[[], AbstractContextManager[Any]], factor: int
    ) -> None:
        self._vae = vae
        self._precision = precision
        self._factor = factor
        self._projection: torch.Tensor | None = None
        self._failed = False

    def decode_preview(self, latents: torch.Tensor) -> NDArray[np.uint8] | None:
        """The colours of ``latents`` [1, channels, h, w]: [h, w, 3], 0 to 255.

        None where they cannot be told, for want of memory this once: no image depends on it. Raises
        what means that the device is lost.
        """
        if self._failed:
            return None
        try:
            if self._projection is None:
                self._projection = self._fit()
            return _project(latents[0].float().cpu(), self._projection)
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                log.warning("a preview ran out of memory and is left out")
                return None
            log.exception("no previews from now on")
            self._failed = True
            return None

    def _fit(self) -> torch.Tensor:
        """The map, [channels + 1, 3]; the last row is what no latents at all look like."""
        pictures = _pictures(PICTURE_LATENTS * self._factor)
        weights = next(self._vae.parameters())
        latents = []
        for picture in pictures:  # One by one: the least memory.
            with self._precision():
                encoded = self._vae.encode(picture[None].to(weights.device, weights.dtype))
            latents.append(encoded.latent_dist.mean.float().cpu())
        scaled = torch.cat(latents) * self._vae.config.scaling_factor
        colours = torch.nn.functional.avg_pool2d(pictures, self._factor)
        known = scaled.permute(0, 2, 3, 1).flatten(0, 2)
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        return torch.linalg.lstsq(known, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution  # type: ignore[no-any-return]


def _pictures(size: int) -> torch.Tensor:
    """Fields of random colours, coarse and fine: [pictures, 3, size, size], -1 to 1."""
    generator = torch.Generator("cpu").manual_seed(0)
    pictures = []
    for cells in CELLS:
        colours = torch.rand((PICTURES_PER_CELL, 3, cells, cells), generator=generator)
        pictures.append(torch.nn.functional.interpolate(colours, size=(size, size)))
    return torch.cat(pictures) * 2 - 1


def _project(latents: torch.Tensor, projection: torch.Tensor) -> NDArray[np.uint8]:
    colours = torch.einsum("chw,cd->hwd", latents, projection[:-1]) + projection[-1]
    unit = (colours * 0.5 + 0.5).nan_to_num().clamp(0, 1)
    pixels: NDArray[np.uint8] = (unit * 255).round().byte().numpy()
    return pixels
