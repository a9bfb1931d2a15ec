"""Trains the demo model: `python -m training.train FOLDER`.

Trains the autoencoder first, then the text model and the UNet together. The defaults take about an
hour on two idle CPU cores, minutes on a GPU. The same seed and steps give the same scenes in the
same order; the weights may still differ in their last bits between machines.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.denoiser import Denoiser, new_denoiser, train_denoiser
from training.export import export_pipeline
from training.latents import LatentSource
from training.tokenizer import write_tokenizer
from training.vae import train_autoencoder
from training.workers import is_first, run

FACTS = "training.json"
"""The file that records how the parts were trained."""


def main() -> None:
    """Parse the command line, train the autoencoder, then the denoiser."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m training.train")
    parser.add_argument("folder", type=Path, help="where to write the pipeline")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="for parts")
    parser.add_argument("--vae-steps", type=int, default=2000, help="batches for the autoencoder")
    parser.add_argument("--vae-minutes", type=float, default=15, help="its most minutes")
    parser.add_argument("--resume", type=Path, help="a model folder to go on from")
    parser.add_argument("--peak-rate", type=float, default=1e-3, help="denoiser's learning rate")
    parser.add_argument("--steps", type=int, default=6000, help="batches for the denoiser")
    parser.add_argument("--minutes", type=float, default=45, help="its most minutes")
    parser.add_argument("--batch", type=int, default=32, help="pictures of 128×128 in a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads or processes")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if options.resume is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae, done = train_autoencoder(options.vae_steps, options.vae_minutes, options.seed, device)
        vae.save_pretrained(options.work / "vae")
        minutes = round((time.monotonic() - started) / 60, 1)
        facts = {"seed": options.seed, "vae_steps": done, "vae_minutes": minutes}
        (options.work / FACTS).write_text(json.dumps(facts), "utf-8")
    workers = 1 if torch.cuda.is_available() else options.threads
    run(workers, denoise, workers, options)


def denoise(rank: int, workers: int, options: argparse.Namespace) -> None:
    """Train the denoiser in one of `workers` processes; the first also writes the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    earlier: Path = options.resume or options.work
    vae = AutoencoderKL.from_pretrained(earlier / "vae")
    facts = json.loads((earlier / FACTS).read_text("utf-8"))
    tokenizer = write_tokenizer(options.work / f"tokenizer-{rank}")
    # The same weights in all processes, then different scenes and noise.
    torch.manual_seed(options.seed)
    denoiser = new_denoiser(tokenizer)
    if options.resume is not None:
        for part, name in ((denoiser.unet, "unet"), (denoiser.text_encoder, "text_encoder")):
            trained = type(part).from_pretrained(options.resume / name)
            part.load_state_dict(trained.state_dict())
    past: list[dict[str, float]] = facts.pop("denoiser_runs", [])
    # A resumed run uses other scenes than the run before it.
    seed = options.seed + 1000 * len(past) + rank
    torch.manual_seed(seed)
    source = LatentSource(
        vae,
        tokenizer,
        seed=seed + 1,
        device=device,
        batch_size=options.batch // workers,
        pool_size=96 * options.batch // workers,
        fresh=options.batch // (3 * workers),
        ease=1.0 if options.resume is None else 0.0,
    )
    started = time.monotonic()

    def runs(step: int) -> list[dict[str, float]]:
        minutes = round((time.monotonic() - started) / 60, 1)
        return [*past, {"steps": step, "minutes": minutes}]

    def export(average: Denoiser, step: int) -> None:
        export_pipeline(options.folder, tokenizer, average, vae)
        done = {"device": device.type, "batch": options.batch, "denoiser_runs": runs(step)}
        text = json.dumps(facts | done, indent=2) + "\n"
        (options.folder / FACTS).write_text(text, "utf-8")

    def checkpoint(average: Denoiser, step: int) -> None:
        if is_first():
            export(average, step)

    average, steps = train_denoiser(
        denoiser, source, options.steps, options.minutes, options.peak_rate, device, checkpoint
    )
    checkpoint(average, steps)


if __name__ == "__main__":
    main()
