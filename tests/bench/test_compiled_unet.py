"""A peer's pipeline with the compiled UNet; a stand-in takes the place of the compiled code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from bench.inprocess.compiled_unet import use_compiled
from darkroom_server.engine.forms.compiled import CompiledDenoiser
from darkroom_server.engine.forms.signature import Values
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import Inductor
from darkroom_server.engine.warmup.formats import MemoryFormat
from tests.engine.tiny import SIZE, write_tiny_model

FORMAT = MemoryFormat(torch.float32, channels_last=False)
ROWS = list[int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], ROWS]:
    """Lets packages load whose output is the UNet's by a factor; returns the rows of the calls."""

    def loads(factor: float) -> ROWS:
        calls: ROWS = []

        def load(_: Inductor, task: CompileTask, file: Path, unet: Any) -> CompiledDenoiser:
            assert file == Path("unet.pt2")
            eager = unet.forward

            def run(values: Values) -> Any:
                calls.append(len(values["sample"]))
                assert values["timestep"].shape == (len(values["sample"]),)
                return [factor * eager(**values)[0]]

            return CompiledDenoiser(run, 2, 1024)

        monkeypatch.setattr(Inductor, "load", load)
        return calls

    return loads


def generate(pipeline: Any, side: int) -> Any:
    return pipeline(
        ["a star", "a moon"],
        num_inference_steps=2,
        width=side,
        height=side,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


def test_calls_of_the_default_size_are_compiled_and_others_are_not(
    folder: Path, load: Callable[[float], ROWS]
) -> None:
    calls = load(1.0)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = generate(pipeline, SIZE)
    use_compiled(pipeline, "unet.pt2", FORMAT)
    calls.clear()
    found = generate(pipeline, SIZE)
    assert calls == [4, 4]
    assert (found == expected).all()
    generate(pipeline, SIZE * 2)
    assert calls == [4, 4]


def test_a_package_of_another_unet_is_an_error(folder: Path, load: Callable[[float], ROWS]) -> None:
    load(1.1)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with pytest.raises(RuntimeError, match=r"unet.pt2 is not the UNet of this pipeline"):
        use_compiled(pipeline, "unet.pt2", FORMAT)
