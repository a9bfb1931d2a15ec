"""The keys and values of prompts are computed once for each batch of the same samples."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch

from darkroom_server.core.engine_config import AdapterSource, EngineConfig
from darkroom_server.core.events import BatchDone
from darkroom_server.core.inputs import Lora
from darkroom_server.engine.components.prompt_projections import (
    PromptProjections,
    bytes_per_prompt,
    keeping,
)
from darkroom_server.engine.families.stable_diffusion import (
    StableDiffusion,
    StableDiffusionModel,
)
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.warmup import placement
from darkroom_server.engine.warmup.formats import MemoryFormat
from darkroom_server.engine.warmup.presets import resolve

from .adapter_files import write_adapter
from .conftest import LoopUnderTest, config_for, make_job
from .fake_cuda import FakeDevice
from .test_memory import family_with
from .tiny import write_tiny_model

WIDTH = 16
"""The tiny UNet's ``cross_attention_dim``."""

STEPS = 6


class Calls:
    """The rows of each call in which a layer that projects prompts computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []

        def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
            if layer in self.layers:
                self.rows.append(x.shape[0])
            return torch.nn.functional.linear(x, layer.weight, layer.bias)

        self.layers: set[torch.nn.Module] = set()
        monkeypatch.setattr(torch.nn.Linear, "forward", forward)

    def watch(self, unet: Any) -> int:
        """Count calls of the layers that project prompts; returns the number of these layers."""
        self.layers = {
            layer
            for name, layer in unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        }
        self.rows.clear()
        return len(self.layers)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def loop(tiny_folder: Path, tmp_path: Path, calls: Calls) -> Iterator[LoopUnderTest]:
    file = tmp_path / "a.safetensors"
    pytest.importorskip("peft")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    write_adapter(file, pipeline)
    made = LoopUnderTest(
        config_for(tiny_folder, adapters=(AdapterSource(id="a", location=str(file)),))
    )
    yield made
    made.close()


@pytest.fixture
def unet(tmp_path: Path) -> Any:
    write_tiny_model(tmp_path)
    return diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")


def call(unet: Any, context: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(len(context), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = unet(latents, 500, context, return_dict=False)[0]
    return found


def prompts_of(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 8, WIDTH, generator=generator) for _ in range(count)]


def test_what_is_kept_is_what_would_be_computed(unet: Any) -> None:
    projections = PromptProjections(unet)
    prompts = prompts_of(3, seed=1)
    with torch.inference_mode():
        context = projections.context(prompts)
        wanted = call(unet, context)
        assert not projections._kept
        for _ in range(3):
            assert projections.context(list(prompts)) is context
            with keeping(projections):
                assert torch.equal(call(unet, context), wanted)
        for layer in ("to_k", "to_v"):
            for name, module in unet.named_modules():
                if name.endswith(f"attn2.{layer}"):
                    module.weight.zero_()
        with keeping(projections):
            assert torch.equal(call(unet, context), wanted), "nothing was kept"
        with keeping(None):
            assert not torch.equal(call(unet, context), wanted)


def test_other_prompts_are_projected_again(unet: Any) -> None:
    projections = PromptProjections(unet)
    first, second = prompts_of(2, seed=1), prompts_of(3, seed=2)
    with torch.inference_mode():
        # As other tensors, and with fewer, more and exchanged rows.
        for prompts in (first, second, second[:2], second[:2][::-1], [p.clone() for p in second]):
            context = projections.context(prompts)
            assert torch.equal(context, torch.cat(prompts))
            wanted = call(unet, torch.cat(prompts))
            for _ in range(2):
                with keeping(projections):
                    assert torch.equal(call(unet, context), wanted)
                    # Not of this batch.
                    assert torch.equal(call(unet, context.clone()), wanted)


def test_the_bytes_are_those_that_are_kept(unet: Any) -> None:
    projections = PromptProjections(unet)
    with torch.inference_mode(), projections.keeping():
        call(unet, projections.context(prompts_of(3, seed=1)))
    kept = sum(each.nbytes for each in projections._kept.values())
    assert kept == 3 * bytes_per_prompt(unet, tokens=8)
    assert kept > 0


def test_a_row_is_measured_with_the_bytes_that_are_kept(
    unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "peak_bytes", lambda *_: 1000)
    runtime = resolve(EngineConfig(models=(), device="cpu"), StableDiffusion.half)
    decoder: Any = SimpleNamespace(tile_pixels=None)
    family = family_with(unet, prompt_tokens=8)
    memory_format = MemoryFormat(torch.float32, channels_last=False)
    needs = placement.measure_memory(lambda _: 0.0, family, decoder, memory_format, runtime)
    assert needs.bytes_per_row == 1000 // 2 + bytes_per_prompt(unet, tokens=8)


def test_an_image_has_its_prompts_projected_once(loop: LoopUnderTest, calls: Calls) -> None:
    model = loop.models["tiny"]
    assert model.projections is not None
    layers = calls.watch(model.unet)
    assert layers > 0
    loop.run(make_job("kept", steps=STEPS))
    assert calls.rows == [2] * layers
    kept = loop.latents["kept", 0]
    model.projections = None
    calls.rows.clear()
    loop.run(make_job("computed", steps=STEPS))
    assert calls.rows == [2] * layers * STEPS
    assert torch.equal(kept, loop.latents["computed", 0])


def test_all_prompts_are_projected_again_if_a_sample_joins(
    loop: LoopUnderTest, calls: Calls
) -> None:
    layers = calls.watch(loop.models["tiny"].unet)

    def join(event: Any) -> None:
        if isinstance(event, BatchDone) and not joined:
            joined.append(True)
            loop.loop.submit(make_job("second", steps=2, prompt="a small red circle"))

    joined: list[bool] = []
    loop.on_event = join
    loop.run(make_job("first", steps=STEPS))
    loop.wait_for(lambda: "second" in loop.ends)
    # The first alone, both, and the first alone again.
    assert calls.rows == [2] * layers + [4] * layers + [2] * layers


def test_batches_with_adapters_compute_at_each_step(loop: LoopUnderTest, calls: Calls) -> None:
    """An adapter adds to a projection in place, so one that is kept would be wrong from then on."""
    plain = make_job("plain", steps=STEPS)
    loop.run(plain)
    layers = calls.watch(loop.models["tiny"].unet)
    loop.run(make_job("adapted", steps=STEPS, loras=(Lora(id="a"),)))
    assert calls.rows == [2] * layers * STEPS
    assert not torch.equal(loop.latents["adapted", 0], loop.latents["plain", 0])
    loop.run(make_job("again", steps=STEPS))
    assert torch.equal(loop.latents["again", 0], loop.latents["plain", 0])


def test_nothing_is_kept_on_a_gpu(cuda: FakeDevice, tiny_folder: Path) -> None:
    loop, _ = start_loop(config_for(tiny_folder, device="cuda"), lambda _: None)
    model = cast("StableDiffusionModel", loop._runner.models["tiny"])
    assert model.unet.device.type == "cuda"
    assert model.projections is None
