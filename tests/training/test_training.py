from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.denoiser import new_denoiser, new_scheduler, sample_timesteps, train_denoiser
from training.export import export_pipeline
from training.latents import LatentSource
from training.rates import ease_at, rate_at
from training.scenes import random_scene
from training.shapes import draw_randomly
from training.tokenizer import write_tokenizer
from training.vae import new_autoencoder, normalise_latents

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    rng = np.random.default_rng(0)
    return draw_randomly([random_scene(rng) for _ in range(8)], rng, 64, 64)[0]


@torch.no_grad()
def test_autoencoder_starts_as_thumbnail(pictures: Tensor) -> None:
    torch.manual_seed(0)
    latents = new_autoencoder().encode(pictures).latent_dist.mean
    thumbnails = torch.nn.functional.avg_pool2d(pictures, 8)
    for channel in range(3):
        pair = torch.stack([latents[:, channel].flatten(), thumbnails[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.8


@torch.no_grad()
def test_normalising_latents_changes_no_picture(pictures: Tensor) -> None:
    torch.manual_seed(0)
    vae = new_autoencoder()
    before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    normalise_latents(vae, np.random.default_rng(0), CPU, count=32)
    latents = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-3)
    rng = np.random.default_rng(0)
    drawn = draw_randomly([random_scene(rng) for _ in range(32)], rng, 128, 128)[0]
    scaled = vae.encode(drawn).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)


def test_rate_ramps_up_and_ends_at_zero() -> None:
    rates = [rate_at(step, step / 2000) for step in range(1, 2001)]
    assert rates[0] < 0.01
    assert max(rates) > 0.9
    assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_scenes_are_easy_at_first_then_fewer_and_none_long_before_the_end() -> None:
    eases = [ease_at(progress / 100) for progress in range(101)]
    assert eases[:15] == [1.0] * 15
    assert eases == sorted(eases, reverse=True)
    assert 0 < eases[25] < 1
    assert not any(eases[35:])


def test_a_source_follows_its_share_of_easy_scenes(tokenizer: Any) -> None:
    source = LatentSource(new_autoencoder(), tokenizer, 0, CPU, 2, pool_size=32, fresh=2)
    plain, _ = tokenizer.encode("a large"), source.batch()
    assert all(ids[: len(plain) - 1].tolist() == plain[:-1] for ids in _worded(source))
    source.ease = 0.0
    assert not all(ids[: len(plain) - 1].tolist() == plain[:-1] for ids in _worded(source))


def test_resuming_from_a_trained_model_uses_no_easy_scenes(tokenizer: Any) -> None:
    torch.manual_seed(0)
    source = LatentSource(new_autoencoder(), tokenizer, 0, CPU, 2, 32, 2, ease=0.0)
    train_denoiser(new_denoiser(tokenizer), source, 2, 10, 1e-3, CPU, lambda *_: None)
    assert source.ease == 0.0


def _worded(source: LatentSource) -> Tensor:
    """The token ids of 20 batches, without the empty prompts."""
    tokens = torch.cat([source.batch().tokens for _ in range(20)])
    return tokens[tokens[:, 1] != tokens[0, -1]]


def test_timesteps_cover_all_noise_levels() -> None:
    torch.manual_seed(0)
    times = sample_timesteps(4000, CPU)
    assert times.min() < 20
    assert times.max() > 980
    assert 0.45 < (times > 700).float().mean() < 0.57
    assert (times >= 900).float().mean() > 0.15


def test_training_moves_the_weights_and_exports(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, denoiser = new_autoencoder(), new_denoiser(tokenizer)
    source = LatentSource(vae, tokenizer, 0, CPU, batch_size=2, pool_size=32, fresh=2)
    reached: list[int] = []
    average, steps = train_denoiser(
        denoiser, source, 2, 10, 1e-3, CPU, lambda _, step: reached.append(step), 1
    )
    assert (steps, reached) == (2, [1, 2])
    assert source.ease == ease_at(0.5)
    # The output starts at exactly zero.
    assert average.unet.conv_out.weight.abs().max() > 0
    export_pipeline(tmp_path / "model", tokenizer, average, vae)
    assert (tmp_path / "model" / "model_index.json").is_file()
    assert not list(tmp_path.glob(".export-*"))


def test_scheduler_starts_at_the_last_timestep() -> None:
    scheduler = new_scheduler()
    for steps in (8, 20):
        scheduler.set_timesteps(steps)
        assert int(scheduler.timesteps[0]) == 999
