"""What a family reads from a folder of the model's variant, and whether it has all its parts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.flux import write_dev, write_schnell
from bench.tiny_families.flux_2 import write_distilled_klein, write_flux_2_dev, write_klein
from bench.tiny_families.hidream import LLAMA_LAYERS, write_hidream
from bench.tiny_families.kolors import write_kolors
from bench.tiny_families.lumina_2 import write_lumina_2
from bench.tiny_families.pixart import write_alpha, write_sigma
from bench.tiny_families.qwen_image import write_qwen_image
from bench.tiny_families.stable_diffusion_3 import write_dual_attention, write_sd3, write_without_t5
from bench.tiny_families.z_image import write_turbo, write_z_image
from darkroom_server.core.engine_config import Dtype, ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import BatchDone, JobFinished
from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.families.qwen_image import QwenImage
from darkroom_server.engine.families.registry import family_of
from darkroom_server.engine.families.suspended import SuspendedFamily
from darkroom_server.engine.loading.defaults import Defaults
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import FEW_ROWS, LoopUnderTest, config_for, make_job
from .folders import edit_index


def family_in(folder: Path) -> SuspendedFamily:
    source = ModelSource(id="tiny", location=str(folder))
    family = family_of(load_pipeline(find_model(source, safety_checker=False), torch.float32))
    assert isinstance(family, SuspendedFamily)
    return family


@pytest.mark.parametrize(
    ("write", "defaults", "tokens"),
    [
        (write_dev, Defaults(steps=28, guidance_scale=3.5), 512),
        (write_schnell, Defaults(steps=4, guidance_scale=0.0), 256),
        (write_sd3, Defaults(steps=28, guidance_scale=7.0), 256),
        (write_dual_attention, Defaults(steps=40, guidance_scale=4.5), 256),
        (write_sigma, Defaults(steps=20, guidance_scale=4.5), 300),
        (write_alpha, Defaults(steps=20, guidance_scale=4.5), 120),
        (write_z_image, Defaults(steps=50, guidance_scale=4.0), 256),
        (write_turbo, Defaults(steps=8, guidance_scale=0.0), 256),
        (write_qwen_image, Defaults(steps=50, guidance_scale=1.0, true_cfg_scale=4.0), 512),
        (write_flux_2_dev, Defaults(steps=50, guidance_scale=4.0), 512),
        (write_klein, Defaults(steps=50, guidance_scale=4.0), 512),
        (write_distilled_klein, Defaults(steps=4, guidance_scale=1.0), 512),
        (write_lumina_2, Defaults(steps=30, guidance_scale=4.0), 127),
        (write_hidream, Defaults(steps=50, guidance_scale=5.0), 128),
    ],
)
def test_defaults_are_the_variant_s(
    tmp_path: Path, write: Callable[[Path], Path], defaults: Defaults, tokens: int
) -> None:
    family = family_in(write(tmp_path))
    assert family.model_defaults == defaults
    assert family.prompt_tokens == family.default_sequence_length == tokens
    assert family.limits(2).max_sequence_length >= tokens
    assert "max_sequence_length" in family.optional_fields


def test_only_flux_dev_takes_the_guidance_as_an_input(tmp_path: Path) -> None:
    dev, schnell = family_in(write_dev(tmp_path / "a")), family_in(write_schnell(tmp_path / "b"))
    assert dev.optional_fields - schnell.optional_fields == {"guidance_scale"}
    for family in (dev, schnell):
        assert family.guidance.scale == "true_cfg_scale"
        assert not family.guidance.applies_to(make_job("a", guidance_scale=9.0))
        assert not family.guidance.applies_to(make_job("b", true_cfg_scale=2.0))
        guided = make_job("c", true_cfg_scale=2.0, empty_negative_prompt=True)
        assert family.guidance.applies_to(guided)


@pytest.mark.parametrize("entry", [[None, None], None])
def test_stable_diffusion_3_does_without_its_t5(tmp_path: Path, entry: list[None] | None) -> None:
    folder = write_without_t5(tmp_path)
    edit_index(folder, text_encoder_3=entry, tokenizer_3=entry)
    family = family_in(folder)
    assert family.pipeline.text_encoder_3 is None
    assert family.prompt_tokens == family.pipeline.tokenizer.model_max_length
    assert family.default_sequence_length is None
    assert family.limits(2).max_sequence_length == 0
    assert not family.optional_fields & {"prompt_3", "negative_prompt_3", "max_sequence_length"}


def test_a_t5_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = write_without_t5(tmp_path)
    edit_index(folder, text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(StartupError, match="no weights of its text_encoder_3"):
        family_in(folder)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        # It takes noise in each step.
        ("FlowMatchLCMScheduler", {}),
        # It takes it if it is configured to.
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_a_scheduler_whose_noise_no_seed_repeats_is_rejected(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    folder = write_schnell(tmp_path)
    edit_index(folder, scheduler=["diffusers", kind])
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": kind, "shift": 1.0, **config}))
    with pytest.raises(StartupError, match=r"which (adds noise that )?no seed repeats") as caught:
        LoopUnderTest(config_for(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


WRITERS = [
    write_dev,
    write_sd3,
    write_sigma,
    write_z_image,
    write_qwen_image,
    write_flux_2_dev,
    write_klein,
    write_lumina_2,
    write_kolors,
    write_hidream,
]


@pytest.mark.parametrize("write", WRITERS)
def test_bfloat16_is_served(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    half: dict[str, Any] = {"dtype": Dtype.BFLOAT16, "autocast": True}
    loop = LoopUnderTest(config_for(write(tmp_path), rows=FEW_ROWS, **half))
    try:
        size = loop.models["tiny"].info.defaults.width
        fields = {"scheduler": SchedulerName.MODEL, "width": size, "height": size}
        jobs = [make_job(name, seed=i, **fields) for i, name in enumerate("ab")]
        assert all(isinstance(end, JobFinished) for end in loop.run(*jobs).values())
        assert loop.image("a").image.data != loop.image("b").image.data
    finally:
        loop.close()


@pytest.mark.parametrize(
    "write", [write_z_image, write_qwen_image, write_flux_2_dev, write_klein, write_lumina_2]
)
def test_a_prompt_is_truncated_by_what_its_template_adds(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """What the text encoder is given differs if, and only if, the prompt's end is cut off."""
    family = family_in(write(tmp_path))
    assert isinstance(family, SuspendedFamily)
    prompt, longer = "a red ring", "a red ring on a blue"
    shortest = next(
        length
        for length in range(1, 200)
        if not family.is_truncated(make_job("a", prompt=prompt, max_sequence_length=length))
    )
    assert shortest > 3, "the template adds nothing"
    assert family.is_truncated(make_job("b", prompt=longer, max_sequence_length=shortest))
    with torch.inference_mode():
        enough, cut = (_read(family, prompt, length) for length in (shortest, shortest - 1))
    assert enough > cut


@pytest.mark.parametrize(("write", "name"), [(write_dev, "prompt_2"), (write_sd3, "prompt_3")])
def test_a_prompt_whose_end_no_encoder_reads_is_truncated(
    tmp_path: Path, write: Callable[[Path], Path], name: str
) -> None:
    family = family_in(write(tmp_path))
    clip = int(family.pipeline.tokenizer.model_max_length)
    long = "star " * (clip + 1)
    fields: dict[str, Any] = {"max_sequence_length": 4 * clip}
    # The T5 reads what is too long for CLIP.
    assert not family.is_truncated(make_job("a", prompt=long, **fields))
    assert not family.is_truncated(make_job("b", prompt="a star", **{**fields, name: long}))
    # CLIP reads what is too long for the T5.
    short = {**fields, "max_sequence_length": 4}
    assert not family.is_truncated(make_job("c", prompt="a red star on a blue ring", **short))
    # With a prompt of its own, the T5 reads nothing of the first.
    assert family.is_truncated(make_job("d", prompt=long, **{**fields, name: "a star"}))
    far = "star " * (4 * clip + 1)
    assert family.is_truncated(make_job("e", prompt="a star", **{**fields, name: far}))
    assert family.is_truncated(make_job("f", prompt=far, **fields))


def test_hidream_reads_no_prompt_beyond_its_limit(tmp_path: Path) -> None:
    family = family_in(write_hidream(tmp_path))
    fields: dict[str, Any] = {"prompt": "a star", "max_sequence_length": 32}
    long = "star " * 33
    assert not family.is_truncated(make_job("a", **fields))
    for name in ("prompt", "prompt_2", "prompt_3", "negative_prompt_2"):
        assert family.is_truncated(make_job("b", **{**fields, name: long}))


def _read(family: SuspendedFamily, prompt: str, length: int) -> int:
    """Tokens of ``prompt`` that the pipeline's text encoder reads and does not mask."""
    encoder, masks = family.pipeline.text_encoder, []
    forward = encoder.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    encoder.forward = keep
    try:
        encoded = family.pipeline.encode_prompt(prompt, max_sequence_length=length)
    finally:
        del encoder.forward
    if isinstance(family, QwenImage):  # It cuts what the encoder returns.
        return int(encoded[0].shape[1])
    return int(masks[0].sum())


def test_hidream_takes_the_sizes_that_its_pipeline_does_not_rescale(tmp_path: Path) -> None:
    folder = write_hidream(tmp_path)
    limits = family_in(folder).limits(2)
    assert (128, 128) in limits.sizes
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def size_of(width: int, height: int) -> tuple[int, int]:
        image = pipeline(
            "a red ring",
            width=width,
            height=height,
            num_inference_steps=1,
            guidance_scale=0.0,
            max_sequence_length=16,
        ).images[0]
        return (image.width, image.height)

    for size in limits.sizes:
        assert size_of(*size) == size
    assert len(limits.sizes) > 2
    others = [(64, 64), (256, 256), (128, 32)]
    assert not set(others) & set(limits.sizes)
    for size in others:
        assert size_of(*size) != size


def test_hidream_s_images_need_not_be_square(tmp_path: Path) -> None:
    """Its denoiser then pads the latents, and masks them."""
    folder = write_hidream(tmp_path)
    wide, high, *_ = [size for size in family_in(folder).limits(2).sizes if size[0] != size[1]]
    loop = LoopUnderTest(config_for(folder, rows=FEW_ROWS))
    try:
        jobs = [
            make_job(f"{name}-{i}", seed=i, width=width, height=height, exact=name == "exact")
            for name in ("exact", "shared")
            for i, (width, height) in enumerate((wide, wide, high))
        ]
        jobs = [replace(job, scheduler=SchedulerName.MODEL) for job in jobs]
        assert all(isinstance(end, JobFinished) for end in loop.run(*jobs).values())
        for i in range(3):
            alone, shared = (loop.latents[f"{name}-{i}", 0] for name in ("exact", "shared"))
            assert float((alone - shared).abs().max() / alone.abs().max()) <= 1e-5
        assert max(e.samples for e in loop.events if isinstance(e, BatchDone)) == 2
        first, second = (loop.latents[f"shared-{i}", 0] for i in range(2))
        assert float((first - second).abs().max() / first.abs().max()) > 1e-3
    finally:
        loop.close()


def test_a_size_that_hidream_s_pipeline_rescales_cannot_be_the_default(tmp_path: Path) -> None:
    folder = write_hidream(tmp_path)
    (folder / "darkroom.json").write_text(json.dumps({"size": 64}), "utf-8")
    with pytest.raises(StartupError, match="makes certain sizes only; leave it out"):
        LoopUnderTest(config_for(folder))


def test_hidream_s_suspended_images_hold_all_layers_of_its_llama(tmp_path: Path) -> None:
    loop = LoopUnderTest(config_for(write_hidream(tmp_path), rows=FEW_ROWS))
    try:
        latents = 4 * 128 * 128 * 4  # Channels, height, width, bytes.
        states = LLAMA_LAYERS * 128 * 16 * 4  # Layers, tokens, channels, bytes.
        # Before a step also the denoiser's output is held, and a tenth is added for safety.
        held = loop.models["tiny"].info.memory.bytes_per_sample / 1.1 - 2 * latents
        assert states < held < 2 * states
    finally:
        loop.close()


@pytest.mark.parametrize("write", [write_sd3, write_hidream])
def test_a_model_s_own_scheduler_must_repeat_its_images(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """As that of HiDream's distilled models, which the pipeline gives no generator."""
    folder = write(tmp_path)
    edit_index(folder, scheduler=["diffusers", "FlowMatchLCMScheduler"])
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "_class_name": "FlowMatchLCMScheduler"}), "utf-8")
    with pytest.raises(StartupError, match=r"FlowMatchLCMScheduler takes .* global generator"):
        LoopUnderTest(config_for(folder))
