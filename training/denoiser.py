"""The denoiser: a text model and a UNet, trained together on the autoencoder's latents."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models import Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.latents import LatentSource
from training.rates import ease_at, rate_at
from training.tokenizer import MAX_TOKENS
from training.workers import is_first, share

TEXT_WIDTH = 96
_EMA_DECAY = 0.999


@dataclass(slots=True)
class Denoiser:
    """The two parts that are trained together."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel

    def parameters(self) -> list[nn.Parameter]:
        """All trained tensors, the text model's first."""
        return [*self.text_encoder.parameters(), *self.unet.parameters()]


def new_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """Return an untrained denoiser: UNet 9.9 million parameters, text model 0.2 million."""
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 176),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    _quieten(unet)
    # Faster on a CPU than the fused attention, whose backward pass is slow there.
    unet.set_attn_processor(AttnProcessor())
    return Denoiser(CLIPTextModel(text_config), unet)


@torch.no_grad()
def _quieten(unet: UNet2DConditionModel) -> None:
    """Start every residual branch, and the output, at zero: training then starts much faster.

    After Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis".
    """
    last = [m.conv2 for m in unet.modules() if isinstance(m, ResnetBlock2D)]
    last += [m.proj_out for m in unet.modules() if isinstance(m, Transformer2DModel)]
    for layer in (*last, unet.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own betas, with v-prediction and steps that start at pure noise."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        # With few steps, "leading" would start far below the last timestep, on a noise level
        # that pure noise does not have.
        timestep_spacing="trailing",
    )
    # For PNDM schedulers that are loaded from this configuration.
    scheduler.register_to_config(skip_prk_steps=True)
    return scheduler


def sample_timesteps(count: int, device: torch.device) -> Tensor:
    """Sample timesteps (count,) in 0..999, with more weight on high ones: half are above 700.

    Above about 700 only the words determine the shape; at lower noise the latents show it, because
    a shape covers dozens of latent pixels. The position shows even above 900, and is decided there.
    """
    return (torch.rand(count).sqrt() * 1000).long().clamp(0, 999).to(device)


def with_noise(
    latents: Tensor, scheduler: DDIMScheduler, evenly: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents with noise of random levels, their timesteps, and the v to predict.

    The timesteps are those of `sample_timesteps`, or `evenly` distributed.
    """
    noise = torch.randn_like(latents)
    count, device = len(latents), latents.device
    times = (torch.rand(count) * 1000).long() if evenly else sample_timesteps(count, device)
    times = times.to(device)
    target = scheduler.get_velocity(latents, noise, times)
    return scheduler.add_noise(latents, noise, times), times, target


def train_denoiser(
    denoiser: Denoiser,
    source: LatentSource,
    steps: int,
    minutes: float,
    peak_rate: float,
    device: torch.device,
    checkpoint: Callable[[Denoiser, int], None],
    checkpoint_every: int = 250,
) -> tuple[Denoiser, int]:
    """Train for `steps` batches or `minutes`, whichever ends first.

    The share of easy scenes follows `ease_at`, and never rises. The learning rate falls to zero
    towards the end. Returns the moving average of the weights and the number of steps. Calls
    `checkpoint` with both every `checkpoint_every` steps.
    """
    scheduler = new_scheduler()
    for module in (denoiser.text_encoder, denoiser.unet):
        module.to(device).train()
    denoiser.unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(denoiser)
    parameters = denoiser.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_rate, weight_decay=1e-3, betas=(0.9, 0.99), fused=True
    )
    started = time.monotonic()
    running = 0.0
    step, progress = 0, 0.0
    while progress < 1:
        step += 1
        source.ease = min(source.ease, ease_at(progress))
        latents, tokens, _ = source.batch()
        noisy, times, target = with_noise(latents, scheduler)
        noisy = noisy.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            words = denoiser.text_encoder(tokens).last_hidden_state
            predicted = denoiser.unet(noisy, times, words).sample
        loss = (predicted.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        progress = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        progress = share(parameters, progress)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * rate_at(step, min(progress, 1.0))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # A young average must forget the random start quickly.
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        _follow(average.parameters(), parameters, decay)
        running += loss.item()
        if step % 50 == 0 and is_first():
            rate = (time.monotonic() - started) / step
            print(f"denoiser {step}/{steps} loss {running / 50:.4f} {rate:.3f} s/step", flush=True)
        if step % 50 == 0:
            running = 0.0
        if step % checkpoint_every == 0:
            checkpoint(average, step)
    return average, step


@torch.no_grad()
def _follow(averages: list[nn.Parameter], parameters: list[nn.Parameter], decay: float) -> None:
    kept = [p.data for p in averages]
    torch._foreach_lerp_(kept, [p.data for p in parameters], 1 - decay)
