"""Images to latents, one image at a time."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from darkroom_server.engine.failures import ImageNotEncoded, is_fatal, is_out_of_memory


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """Encodes images with a pipeline's VAE, in the context that ``precision`` makes."""

    vae: Any
    precision: Callable[[], AbstractContextManager[Any]]

    def encode(self, images: torch.Tensor, options: Mapping[str, Any]) -> Any:
        """What the VAE's encode returns for ``images``, with its further arguments ``options``.

        Raises an error that means that the device is lost or has no memory, and otherwise
        ``ImageNotEncoded``.
        """
        try:
            with self.precision():
                return self.vae.encode(images.to(self.vae.dtype), **options)
        except Exception as error:
            if is_fatal(error) or is_out_of_memory(error):
                raise
            raise ImageNotEncoded(str(error)) from error


@dataclass(slots=True)
class JobImageEncoder:
    """Encodes the input images of one job, each once for all images of the job.

    What the VAE returns is a distribution; each image of the job has its own noise from it.
    """

    encoder: ImageEncoder
    _encoded: list[tuple[torch.Tensor, Mapping[str, Any], Any]] = field(default_factory=list)

    def encode(self, images: torch.Tensor, options: Mapping[str, Any]) -> Any:
        """As ``ImageEncoder.encode``."""
        for known, of_options, encoded in self._encoded:
            if of_options == options and torch.equal(known, images):
                return encoded
        encoded = self.encoder.encode(images, options)
        self._encoded.append((images, options, encoded))
        return encoded
