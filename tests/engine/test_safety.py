"""The safety checker: loaded only if configured; flagged images are withheld."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from darkroom_server.core.engine_config import ModelSource
from darkroom_server.core.errors import StartupError
from darkroom_server.engine.components.safety_checker import SafetyChecker
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline

from .conftest import LoopUnderTest, config_for, make_job
from .folders import edit_index, edited

SIZE = 32
"""Of the square that the checker looks at, in pixels."""

PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def make_checker(threshold: float) -> StableDiffusionSafetyChecker:
    """A random checker that flags images whose likeness to a concept is above ``threshold``."""
    torch.manual_seed(3)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            text_config={**PART, "num_attention_heads": 2},
            vision_config={
                **PART,
                "num_attention_heads": 2,
                "image_size": SIZE,
                "patch_size": 8,
                "projection_dim": 16,
            },
            projection_dim=16,
        )
    ).eval()
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn(17, 16))
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


def make_processor() -> CLIPImageProcessor:
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)


def add_checker(folder: Path, threshold: float) -> None:
    make_checker(threshold).save_pretrained(folder / "safety_checker")
    make_processor().save_pretrained(folder / "feature_extractor")
    edit_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
def test_flagged_images_are_withheld(
    threshold: float,
    flagged: bool,
    tiny_folder: Path,
    shared_loop: LoopUnderTest,
    tmp_path: Path,
) -> None:
    folder = edited(tiny_folder, tmp_path / "model", lambda f: add_checker(f, threshold))
    loop = LoopUnderTest(config_for(folder, safety_checker=True))
    job = make_job(f"checked-{flagged}", exact=True)
    try:
        assert loop.models["tiny"].info.runtime.safety_checker
        loop.run(job)
    finally:
        loop.close()
    shared_loop.run(job)
    image = loop.image(job.id).image
    assert image.flagged is flagged
    assert image.data == (b"" if flagged else shared_loop.image(job.id).image.data)


def test_each_image_is_judged_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    images[1] //= 8
    likeness = [_likeness(image) for image in images]
    assert abs(likeness[0] - likeness[1]) > 0.01, "the checker rounds to a thousandth"
    checker = SafetyChecker(make_checker(sum(likeness) / 2), make_processor())
    before = images.copy()
    assert [checker.flags(image) for image in images] == [x > sum(likeness) / 2 for x in likeness]
    assert np.array_equal(images, before), "the checker blackens what it flags"


def _likeness(image: np.ndarray) -> float:
    checker = make_checker(0.0)
    with torch.no_grad():
        pixels = make_processor()(image, return_tensors="pt").pixel_values
        embedding = checker.visual_projection(checker.vision_model(pixels)[1])
        return float(torch.cosine_similarity(embedding, checker.concept_embeds).max())


def test_a_checker_in_half_precision() -> None:
    checker = SafetyChecker(make_checker(-2.0).to(torch.bfloat16), make_processor())
    assert checker.flags(np.zeros((64, 64, 3), np.uint8))


def test_an_image_that_cannot_be_checked_is_withheld() -> None:
    def failing(**_: object) -> None:
        raise RuntimeError("not enough memory")

    checker = make_checker(2.0)
    checker.forward = failing
    assert SafetyChecker(checker, make_processor()).flags(np.zeros((64, 64, 3), np.uint8))


def test_a_lost_device_is_not_hidden() -> None:
    def failing(**_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checker = make_checker(2.0)
    checker.forward = failing
    with pytest.raises(RuntimeError, match="CUDA error"):
        SafetyChecker(checker, make_processor()).flags(np.zeros((64, 64, 3), np.uint8))


def test_without_the_flag_it_is_not_even_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "model", lambda f: add_checker(f, -2.0))
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"broken")
    shutil.rmtree(folder / "feature_extractor")
    source = ModelSource(id="tiny", location=str(folder))
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.float32)
    assert pipeline.safety_checker is None
    with pytest.raises(StartupError, match="its safety_checker cannot be loaded"):
        load_pipeline(find_model(source, safety_checker=True), torch.float32)


def test_a_model_without_one_says_so(tiny_folder: Path) -> None:
    with pytest.raises(StartupError, match="no safety checker: leave --safety-checker out"):
        LoopUnderTest(config_for(tiny_folder, safety_checker=True))
