"""Latents as tokens: each is a square of four latent pixels, with all their channels."""

import torch


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``tokens`` [1, height × width / 4, 4 × channels] as latents [1, channels, height, width].

    ``height`` and ``width`` are in latent pixels and even.
    """
    channels = tokens.shape[-1] // 4
    squares = tokens.reshape(1, height // 2, width // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(1, channels, height, width)
