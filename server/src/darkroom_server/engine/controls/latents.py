"""Control images as latents, for nets that read them so."""

import torch
from diffusers.image_processor import VaeImageProcessor

from darkroom_server.core.inputs import InputImage
from darkroom_server.engine.conditioning.image_encoder import ImageEncoder
from darkroom_server.engine.conditioning.input_images import pil_image


def signed_pixels(image: InputImage) -> torch.Tensor:
    """The pixels of ``image``, -1 to 1, [1, 3, height, width]."""
    processor = VaeImageProcessor(do_convert_rgb=True)
    pixels: torch.Tensor = processor.preprocess(pil_image(image), image.height, image.width)
    # As in diffusers: another layout may change the last bits.
    return pixels.contiguous()


def control_latents(
    image: InputImage, rows: int, images: ImageEncoder, generator: torch.Generator, shift: float
) -> torch.Tensor:
    """The VAE's latents of ``image``, less ``shift`` and scaled, [rows, channels, height, width].

    ``generator`` makes the noise in them, other noise for each row. Raises as
    ``ImageEncoder.encode``.
    """
    pixels = signed_pixels(image).to(images.vae.device)
    encoded = images.encode(torch.cat([pixels] * rows), {})
    latents: torch.Tensor = encoded.latent_dist.sample(generator)
    return (latents - shift) * images.vae.config.scaling_factor  # type: ignore[no-any-return]
