"""Denoisers compiled for real: `make test-compile`, some minutes."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families import CASES
from bench.tiny_families.case import FamilyCase
from darkroom_server.core.engine_config import Compile, Dtype, EngineConfig, ModelSource
from darkroom_server.core.model_runtime import DenoiserForm
from darkroom_server.engine.forms.compiled_blocks import has_blocks
from darkroom_server.engine.forms.exporting import example
from darkroom_server.engine.forms.offering import _task
from darkroom_server.engine.forms.signature import Kinds, TensorKind, largest_error
from darkroom_server.engine.forms.toolchain import Inductor
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.settings.sources import DEMO_MODEL

from .conftest import LoopUnderTest, config_for, make_job

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]


class NoCompile(Inductor):
    """Uses what is there, and compiles nothing."""

    def compile(self, *_: Any) -> None:
        raise AssertionError("compiled again")


def demo(cache: Path, when: Compile) -> EngineConfig:
    return config_for(
        DEMO_MODEL,
        models=(ModelSource(id="tiny", location=str(DEMO_MODEL)),),
        dtype=Dtype.BFLOAT16,
        rows=8,
        threads=2,
        compile=when,
        compile_cache=str(cache),
    )


def images(loop: LoopUnderTest) -> dict[str, torch.Tensor]:
    """The last latents of an exact image, of one alone and of four together, by name.

    Not their pixels: the demo model's VAE maps colours to a few.
    """
    size = {"width": 128, "height": 128}  # The default, which is compiled.
    loop.run(
        make_job("exact", exact=True, **size),
        make_job("one", **size),
        *(make_job(f"many {i}", seed=i, steps=12, guidance_scale=3.0, **size) for i in range(4)),
    )
    return {id: loop.latents[id, 0].float() for id in loop.ends}


def test_the_demo_model_is_compiled_and_its_images_stay_the_same(tmp_path: Path) -> None:
    loop = LoopUnderTest(demo(tmp_path, Compile.OFF))
    try:
        eager = images(loop)
    finally:
        loop.close()
    loop = LoopUnderTest(demo(tmp_path, Compile.BLOCKING), Inductor(), start_seconds=1200)
    try:
        assert loop.models["tiny"].info.runtime.denoiser is DenoiserForm.COMPILED
        compiled = images(loop)
    finally:
        loop.close()
    assert torch.equal(compiled.pop("exact"), eager.pop("exact"))
    for id, latents in eager.items():
        error = float((compiled[id] - latents).norm())
        others = [float((each - latents).norm()) for name, each in eager.items() if name != id]
        assert 0 < error < 0.2 * min(others), f"{id}: {error} beside {others}"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".pt2"]

    loop = LoopUnderTest(demo(tmp_path, Compile.CACHED), NoCompile())
    try:
        assert loop.models["tiny"].info.runtime.denoiser is DenoiserForm.COMPILED
    finally:
        loop.close()


def test_a_denoiser_is_compiled_for_one_number_of_rows(tmp_path: Path) -> None:
    """As for a graph of a GPU: the package takes that number only, and has no locks."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(DEMO_MODEL, subfolder="unet")
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    rows = 4
    kinds: Kinds = {
        "sample": TensorKind((None, 4, side, side), torch.float32),
        "timestep": TensorKind((None,), torch.float32),
        "encoder_hidden_states": TensorKind((None, 77, width), torch.float32),
        "return_dict": False,
    }
    memory_format = MemoryFormat(torch.float32, channels_last=False)
    task = _task(unet, kinds, memory_format, torch.device("cpu"), rows)
    inductor, file = Inductor(), tmp_path / "unet.pt2"
    inductor.compile(task, file)
    shares = [users(weight) for weight in unet.parameters()]
    compiled = inductor.load(task, file, unet)
    assert [compiled.takes(each, exact=False) for each in (2, 4, 5)] == [False, True, False]
    values = {name: example(kind, rows, memory_format.layout) for name, kind in kinds.items()}
    with torch.inference_mode():
        error = largest_error(compiled(values)[0], unet(**values)[0])
    assert 0 < error < 1e-3
    assert [users(weight) for weight in unet.parameters()] == shares, "no unload would free them"


def users(weight: torch.Tensor) -> int:
    """How many tensors own the memory of ``weight``."""
    return int(torch._C._storage_Use_Count(weight.untyped_storage()._cdata))


COMPILED = {"SDXL": False, "Stable Diffusion 3": False, "FLUX.1 dev": False, "Chroma": True}
"""A UNet and transformers, and whether only the repeated blocks can be compiled."""


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in COMPILED], ids=lambda case: case.name
)
def test_a_familys_denoiser_is_compiled(case: FamilyCase, tmp_path: Path) -> None:
    """The tiny model of another family: all its steps, for any number of rows."""
    folder = case.write(tmp_path / "model")
    found: dict[DenoiserForm, dict[str, torch.Tensor]] = {}
    for when in (Compile.OFF, Compile.BLOCKING):
        config = config_for(
            folder, rows=8, threads=2, compile=when, compile_cache=str(tmp_path / "compiled")
        )
        loop = LoopUnderTest(config, Inductor(), start_seconds=1200)
        try:
            info = loop.models["tiny"].info
            defaults = info.defaults
            # The calls that are compiled.
            fields = {
                "width": defaults.width,
                "height": defaults.height,
                "scheduler": defaults.scheduler,
                "max_sequence_length": defaults.max_sequence_length,
            }
            jobs = [make_job(str(i), **{**each, **fields}) for i, each in enumerate(case.jobs[:3])]
            loop.run(*jobs, make_job("exact", exact=True, **{**case.jobs[0], **fields}))
            found[info.runtime.denoiser] = {id: loop.latents[id, 0].float() for id in loop.ends}
        finally:
            loop.close()
    assert set(found) == {DenoiserForm.EAGER, DenoiserForm.COMPILED}
    (package,) = (tmp_path / "compiled").glob("*.pt2")
    assert has_blocks(package) is COMPILED[case.name]
    eager, compiled = found[DenoiserForm.EAGER], found[DenoiserForm.COMPILED]
    assert torch.equal(compiled.pop("exact"), eager.pop("exact"))
    for id, latents in eager.items():
        error = float((compiled[id] - latents).norm())
        others = [float((each - latents).norm()) for name, each in eager.items() if name != id]
        assert 0 < error < 0.01 * min(others), f"{id}: {error} beside {others}"
