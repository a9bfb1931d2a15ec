"""Previews: unfinished latents to RGB by one linear map, which takes far less time than the VAE.

The map is fitted by least squares to the model's own VAE: its encoder turns coloured pictures into
latents, and each latent pixel is matched with the mean colour of its patch of the picture. On the
demo model the map explains nine tenths of the colours' variance.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from darkroom_server.engine.failures import is_fatal, is_out_of_memory

log = structlog.get_logger(__name__)

CELLS = (1, 2, 4, 8)
"""Uniformly coloured squares along one side of the pictures that the map is fitted to."""

PICTURES_PER_CELL = 4
PICTURE_LATENTS = 8
"""Width and height of a picture in latent pixels: 1024 of these in all pictures."""


class Previewer:
    """Makes previews of one model's latents, once the map is fitted.

    With ``video`` the VAE encodes videos: a picture is one of a single frame.
    """

    def __init__(
        self,
        vae: Any,
        precision: Callable[[], AbstractContextManager[Any]],
        factor: int,
        *,
        video: bool = False,
    ) -> None:
        self._video = video
        self._vae = vae
        self._precision = precision
        self._factor = factor
        self._projection: torch.Tensor | None = None
        self._failed = False

    def fit(self, maps: dict[str, torch.Tensor] | None = None, key: str = "") -> None:
        """Fit the map, unless it is fitted; if there is no memory now, the next preview does.

        ``maps`` has those that were fitted to other models' VAEs, by the key of their weights; the
        VAE with the same ``key`` needs no other one. "": the key is not known. Raises an error that
        means that the device is lost.
        """
        maps = {} if maps is None else maps
        with self._contained():
            if self._projection is None:
                self._projection = maps[key] if key in maps else self._fit()
            if key:
                maps[key] = self._projection

    def decode_preview(self, latents: torch.Tensor) -> NDArray[np.uint8] | None:
        """The colours of ``latents`` [1, channels, h, w]: [h, w, 3], 0 to 255.

        None if there is no memory for it now, or if the map cannot be fitted: no image depends on
        it. Raises an error that means that the device is lost.
        """
        if self._failed:
            return None
        self.fit()
        with self._contained():
            if self._projection is not None:
                return _project(latents[0].float().cpu(), self._projection)
        return None

    @contextmanager
    def _contained(self) -> Iterator[None]:
        """Disable previews if one fails, but not for want of memory: no image depends on them."""
        try:
            yield
        except Exception as error:
            if is_fatal(error):
                raise
            if is_out_of_memory(error):
                log.warning("preview ran out of memory and is skipped")
                return
            log.exception("previews failed and are disabled")
            self._failed = True

    def _fit(self) -> torch.Tensor:
        """The map, [channels + 1, 3]; its last row is the colour of latents that are all zero."""
        pictures = _pictures(PICTURE_LATENTS * self._factor)
        weights = next(self._vae.parameters())
        latents = []
        for picture in pictures:  # One at a time needs the least memory.
            image = picture[None].to(weights.device, weights.dtype)
            with self._precision():
                encoded = self._vae.encode(image.unsqueeze(2) if self._video else image)
            mean = encoded.latent_dist.mean.float().cpu()
            latents.append(mean[:, :, 0] if self._video else mean)
        config = self._vae.config
        shift = config.get("shift_factor") or 0.0
        scaled = (torch.cat(latents) - shift) * config.get("scaling_factor", 1.0)
        colours = torch.nn.functional.avg_pool2d(pictures, self._factor)
        known = scaled.permute(0, 2, 3, 1).flatten(0, 2)
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        return torch.linalg.lstsq(known, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution  # type: ignore[no-any-return]


def _pictures(size: int) -> torch.Tensor:
    """Random colours in coarse and fine squares: [pictures, 3, size, size], -1 to 1."""
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
