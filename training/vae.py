"""The autoencoder: pictures to latents an eighth of their size, and back."""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from training.rates import rate_at
from training.scenes import random_scene
from training.shapes import draw_randomly

_PEAK_RATE = 1.5e-3
_KL_WEIGHT = 1e-3
_LATENT_NOISE = 0.1
_EDGE_WEIGHT = 2.0
_LAYOUTS = (
    # (probability, pictures, picture side, crop side), with about the same number of pixels. Whole
    # pictures matter because group norms use the whole picture; crops contain more edges.
    (0.30, 16, 128, 64),
    (0.30, 16, 64, 64),
    (0.30, 4, 128, 128),
    (0.07, 2, 192, 192),
    (0.03, 1, 256, 256),
)


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder of 0.94 million parameters, fully convolutional.

    One group per norm: groups of two channels would remove the colour of a flat picture, because a
    norm keeps only differences within a group.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=128,
    )
    start_as_thumbnail(vae)
    return vae


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> None:
    """Initialize the weights: the latent is a thumbnail, and the picture its enlargement.

    From random weights it takes a thousand batches until colours pass at all. Here red, green and
    blue pass from the start in channels 0 to 2, and their negatives in channels 3 to 5:
    silu(x) - silu(-x) = x passes them through the last activation. All other channels, and the
    first convolution of every residual block, keep their random initialization.
    """
    down, up = vae.encoder, vae.decoder
    signed = torch.cat([torch.eye(3), -torch.eye(3)])
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                _pass(module.conv_shortcut, torch.eye(6), 0)
        elif isinstance(module, Downsample2D):
            _pass(module.conv, torch.eye(6), 1)
            # The padding is at the right and bottom only, so the 2x2 mean is the kernel's corner.
            module.conv.weight[:6] = 0
            for channel in range(6):
                module.conv.weight[channel, channel, :2, :2] = 0.25
        elif isinstance(module, Upsample2D):
            _pass(module.conv, torch.eye(6), 1)
    _pass(down.conv_in, signed, 1)
    _pass(down.conv_out, signed.T, 1)
    _pass(up.conv_in, signed, 1)
    _pass(up.conv_out, signed.T, 1)
    _pass(vae.quant_conv, torch.eye(8), 0)
    _pass(vae.post_quant_conv, torch.eye(4), 0)
    # Start with little posterior noise.
    down.conv_out.weight[4:] *= 0.1
    nn.init.constant_(down.conv_out.bias[4:], -4.0)


def _pass(conv: nn.Conv2d, matrix: Tensor, middle: int) -> None:
    """Make a convolution's first outputs a matrix (outputs, inputs) times its first inputs."""
    rows, columns = matrix.shape
    conv.weight[:rows] = 0
    conv.weight[:rows, :columns, middle, middle] = matrix
    if conv.bias is not None:
        conv.bias[:rows] = 0


def _batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return pictures (n, 3, s, s) in -1..1, and pixel weights (n, 1, s, s) that favour edges."""
    _, count, side, crop = _LAYOUTS[int(rng.choice(len(_LAYOUTS), p=[e[0] for e in _LAYOUTS]))]
    pictures, masks = draw_randomly([random_scene(rng) for _ in range(count)], rng, side, side)
    masks = masks.unsqueeze(1)
    if crop < side:
        top, left = (int(v) for v in rng.integers(0, side - crop + 1, size=2))
        pictures = pictures[..., top : top + crop, left : left + crop]
        masks = masks[..., top : top + crop, left : left + crop]
    widest = torch.nn.functional.max_pool2d(masks, 5, 1, 2)
    narrowest = -torch.nn.functional.max_pool2d(-masks, 5, 1, 2)
    return pictures, 1 + _EDGE_WEIGHT * (widest - narrowest)


def train_autoencoder(
    steps: int, minutes: float, seed: int, device: torch.device
) -> tuple[AutoencoderKL, int]:
    """Train an autoencoder for `steps` batches or `minutes`, then normalise its latents.

    Returns it and the number of steps. Noise on the latents teaches the decoder to make a clean
    edge from a latent that the denoiser got only nearly right.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = new_autoencoder().to(device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=_PEAK_RATE, weight_decay=1e-4, betas=(0.9, 0.99)
    )
    started = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        step += 1
        progress = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * rate_at(step, min(progress, 1.0))
        pictures, weights = (t.to(device) for t in _batch(rng))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample()
            latents = latents + _LATENT_NOISE * torch.randn_like(latents)
            rebuilt = vae.decode(latents).sample
        error = rebuilt.float() - pictures
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = ((error.abs() + error.square()) * weights).mean() + _KL_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            rate = (time.monotonic() - started) / step
            print(
                f"vae {step}/{steps} loss {loss.item():.4f} error {error.abs().mean().item():.4f}"
                f" kl {divergence.item():.2f} {rate:.3f} s/step",
                flush=True,
            )
    normalise_latents(vae, rng, device)
    return vae.eval(), step


@torch.no_grad()
def normalise_latents(
    vae: AutoencoderKL, rng: np.random.Generator, device: torch.device, count: int = 256
) -> None:
    """Centre every latent channel and give all the same spread, without changing any picture.

    The shift and the spread of each channel go into the two 1×1 quantisation convolutions, the
    common scale into `scaling_factor`, which every pipeline applies. `count` scenes are measured.
    """
    pictures, _ = draw_randomly([random_scene(rng) for _ in range(count)], rng, 128, 128)
    latents = torch.cat([vae.encode(p.to(device)).latent_dist.mean for p in pictures.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    common = std.mean()
    gain = common / std
    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None and after is not None and before.bias is not None
    assert after.bias is not None
    # The decoder first restores the latent it was trained on: z = z' / gain + mean.
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= gain.view(1, -1, 1, 1)
    before.weight[:4] *= gain.view(-1, 1, 1, 1)
    before.bias[:4] = (before.bias[:4] - mean) * gain
    before.bias[4:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5))
