"""Latents as tokens: each is a square of four latent pixels, with all their channels."""

import torch

from darkroom_server.core.job import Job
from darkroom_server.engine.families.suspended import TransformerFamily


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents [1, channels, height, width] as tokens [1, height × width / 4, 4 × channels]."""
    _, channels, height, width = latents.shape
    squares = latents.reshape(1, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width // 4, channels * 4)


class PackedLatentsFamily(TransformerFamily):
    """A family whose scheduler steps tokens [1, height × width / 4, 4 × channels]."""

    size_multiple_factor = 2

    def vae_latents(self, stepped: torch.Tensor, job: Job) -> torch.Tensor:
        """The tokens ``stepped`` as latents [1, channels, height, width]."""
        height, width = job.height // self.latent_factor, job.width // self.latent_factor
        channels = stepped.shape[-1] // 4
        squares = stepped.reshape(1, height // 2, width // 2, channels, 2, 2)
        return squares.permute(0, 3, 1, 4, 2, 5).reshape(1, channels, height, width)
