"""Start-up: memory formats, restarts with previous measurements, and diffusers' own pictures."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import structlog
import torch
from diffusers.hooks import apply_layerwise_casting
from torch.utils._python_dispatch import TorchDispatchMode

from darkroom_server.core.engine_config import Attention, Dtype, EngineConfig, ModelSource, Preset
from darkroom_server.core.errors import StartupError
from darkroom_server.core.events import RowLimitCorrected
from darkroom_server.core.job import SchedulerName
from darkroom_server.core.model_runtime import RowLimitSource
from darkroom_server.engine.adapters.module import AdaptedModule
from darkroom_server.engine.adapters.weights import LayerWeights
from darkroom_server.engine.batch import Group
from darkroom_server.engine.families.stable_diffusion import StableDiffusion
from darkroom_server.engine.loading.pipeline import find_model, load_pipeline
from darkroom_server.engine.loading.startup import start_loop
from darkroom_server.engine.warmup import measurement, placement, presets
from darkroom_server.engine.warmup.eight_bits import store_in_eight_bits
from darkroom_server.engine.warmup.presets import Runtime, resolve

from .conftest import LoopUnderTest, config_for, make_job

OWN: dict[str, Any] = {"dtype": Dtype.AUTO, "attention": None, "autocast": None}
"""The fields that ``config_for`` sets, left to the preset."""


def test_more_heads_per_slice_than_there_are(tiny_folder: Path) -> None:
    config = config_for(tiny_folder, attention=Attention.SLICED, slice_size="64")
    with pytest.raises(StartupError, match="--slice-size 64 is more than"):
        LoopUnderTest(config)


def test_a_model_that_does_not_fit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(measurement, "measure_memory", allocate)
    with pytest.raises(StartupError, match=r"need \d+ of \d+ available bytes, and one"):
        LoopUnderTest(config_for(tiny_folder, measurement_cache=None))


def test_channels_last_reaches_the_weights(tiny_folder: Path) -> None:
    loop = LoopUnderTest(config_for(tiny_folder, channels_last=True))
    try:
        model = loop.models["tiny"]
        assert model.info.runtime.channels_last
        weight = model.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    finally:
        loop.close()


def test_a_restart_with_previous_measurements(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_folder, channels_last=None, rows=None, measurement_cache=None, **OWN)
    job = make_job("restarted", exact=True)
    found = []
    previous_measurements: tuple[Any, ...] = ()
    for _ in range(2):
        loop = LoopUnderTest(
            dataclasses.replace(config, previous_measurements=previous_measurements)
        )
        try:
            loop.run(job)
            info = loop.models["tiny"].info
        finally:
            loop.close()
        found.append((info.runtime, info.limits.max_rows, loop.image(job.id).image.data))
        following = dataclasses.replace(config, device="auto").with_measurements((info,))
        assert following.device == "cpu", "not what auto would make of a lost GPU"
        # What real batches corrected meanwhile is not lost either.
        following = following.with_correction(RowLimitCorrected("tiny", info.limits.max_rows))
        previous_measurements = following.previous_measurements
        monkeypatch.setattr(measurement, "_measure_now", _never)
    assert found[0] == found[1]
    assert info.limits.row_limit_source is RowLimitSource.CORRECTED


def _never(*_: object) -> None:
    raise AssertionError("measured again")


def test_an_exact_number_of_rows(tiny_folder: Path) -> None:
    """``rows`` is the row limit whatever was measured; ``max_rows`` only bounds it."""
    for rows in (2, 6):
        loop = LoopUnderTest(config_for(tiny_folder, rows=rows, max_rows=4))
        loop.close()
        info = loop.models["tiny"].info
        assert (info.limits.max_rows, info.limits.row_limit_source) == (rows, RowLimitSource.SET)
        assert {r for r, _ in info.speed.passes} == {2, rows}
        assert loop.row_limits.next_rows(Group("tiny", 64, 64, 77), 100) == rows
    config = config_for(tiny_folder, rows=None, max_rows=4, measurement_cache=None)
    loop = LoopUnderTest(config)
    loop.close()
    info = loop.models["tiny"].info
    assert info.limits.max_rows <= info.most_rows == 4
    assert info.limits.row_limit_source is RowLimitSource.MEASURED


@pytest.mark.parametrize("scheduler", [SchedulerName.DDIM, SchedulerName.DPMPP_2M])
def test_frugal_equals_diffusers(scheduler: SchedulerName, tiny_folder: Path) -> None:
    loop = LoopUnderTest(config_for(tiny_folder, preset=Preset.FRUGAL, **OWN))
    job = make_job(f"frugal-{scheduler}", scheduler=scheduler, exact=True)
    try:
        loop.run(job)
    finally:
        loop.close()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_attention_slicing()
    if scheduler is SchedulerName.DPMPP_2M:
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (wanted,) = pipeline(
            job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed_of(0)),
        ).images
    data = loop.image(job.id).image.data
    found = np.frombuffer(data, np.uint8).reshape(job.height, job.width, 3)
    assert np.abs(found.astype(int) - np.asarray(wanted).astype(int)).max() == 0


def placed(folder: Path, **fields: Any) -> tuple[Any, Runtime]:
    """A pipeline placed by the preset ``tiny``, with ``fields`` changed."""
    runtime = resolve(
        config_for(folder, preset=Preset.TINY, **OWN, vae_tiling=None), StableDiffusion.half
    )
    runtime = dataclasses.replace(runtime, **fields)
    source = ModelSource(id="tiny", location=str(folder))
    pipeline = load_pipeline(find_model(source, safety_checker=False), torch.bfloat16)
    family = StableDiffusion(pipeline)
    memory_format = placement.convert(family, runtime)
    if runtime.fp8_storage:
        store_in_eight_bits(family.denoiser, memory_format.dtype)
    return pipeline, runtime


def test_weights_in_eight_bits_predict_nearly_the_same(tiny_folder: Path) -> None:
    unets = [placed(tiny_folder, fp8_storage=stored)[0].unet for stored in (False, True)]
    weight = unets[1].conv_in.weight, unets[1].mid_block.resnets[0].conv1.weight
    config = unets[0].config
    size = config.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, size, size, generator=generator).bfloat16()
    context = torch.randn(2, 77, config.cross_attention_dim, generator=generator).bfloat16()
    with torch.inference_mode():
        plain, stored = (
            unet(latents, torch.tensor([500, 20]), encoder_hidden_states=context).sample.float()
            for unet in unets
        )
    assert torch.float8_e4m3fn in {each.dtype for each in weight}
    assert 0 < (plain - stored).norm() / plain.norm() < 0.1


CASTS = torch.ops.aten.to, torch.ops.aten._to_copy


def stored_layers(*, diffusers_own: bool) -> Any:
    """Layers with weights in eight bits, as diffusers casts them or as we do."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)
    model: Any = torch.nn.Sequential(*layers).bfloat16()
    if diffusers_own:
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)
    else:
        model.enable_layerwise_casting = partial(apply_layerwise_casting, model)
        store_in_eight_bits(model, torch.bfloat16)
    return model.requires_grad_(False)


def test_stored_weights_stay_and_compute_what_diffusers_casts_do() -> None:
    class Casts(TorchDispatchMode):
        """Counts casts."""

        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func._overloadpacket in CASTS
            return func(*args, **(kwargs or {}))

    theirs, ours = (stored_layers(diffusers_own=own) for own in (True, False))
    before = list(ours.parameters())
    inputs = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        with Casts() as twice:  # type: ignore[no-untyped-call]
            wanted = theirs(inputs)
        with Casts() as once:  # type: ignore[no-untyped-call]
            found = ours(inputs)
    assert torch.equal(found, wanted)
    assert (once.count, twice.count) == (len(before), 2 * len(before))
    assert all(a is b for a, b in zip(ours.parameters(), before, strict=True))
    with pytest.raises(RuntimeError), torch.inference_mode():
        ours(inputs[:, :7])
    assert {each.dtype for each in ours.parameters()} == {torch.float8_e4m3fn}


def test_an_image_of_the_usual_size_is_decoded_by_tiles(tiny_folder: Path) -> None:
    pipeline, runtime = placed(tiny_folder)
    assert runtime.vae_tiling
    size = pipeline.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen: list[int] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, z: seen.append(z[0].shape[-1]))
    with torch.inference_mode():
        tiled = pipeline.vae.decode(latents).sample
        pipeline.vae.disable_tiling()
        whole = pipeline.vae.decode(latents).sample
    assert tiled.shape == whole.shape
    assert max(seen[:-1]) == size // 2, "the largest multiple of four in three quarters of eight"
    assert seen[-1] == size


def test_a_dora_adapter_reads_weights_in_eight_bits() -> None:
    def changed_by_dora(layers: Any) -> float:
        random = torch.Generator().manual_seed(2)
        down, up = (torch.randn(*shape, generator=random).bfloat16() for shape in ((2, 8), (16, 2)))
        weights = {"0": LayerWeights(down=down, up=up, magnitude=torch.ones(16).bfloat16())}
        inputs = torch.randn(3, 8, generator=random).bfloat16()
        adapted = AdaptedModule(layers, slots=1, dtype=torch.bfloat16)
        with torch.inference_mode():
            plain = layers(inputs).float()
            with adapted.rows([(("dora", 1.0),)] * 3, {"dora": weights}):
                return float((layers(inputs).float() - plain).norm() / plain.norm())

    layers = stored_layers(diffusers_own=False)
    layers.device = torch.device("cpu")
    assert changed_by_dora(layers) > 0.1


def test_a_start_on_the_cpu_of_a_machine_with_a_gpu_is_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "GPU_NODES", ("null",))
    threads = torch.get_num_threads()

    def errors(device: str) -> list[str]:
        with structlog.testing.capture_logs() as lines:
            start_loop(EngineConfig(models=(), device=device, threads=threads), lambda _: None)
        return [line["event"] for line in lines if line["log_level"] == "error"]

    (error,) = errors("auto")
    assert error.startswith("/dev/null is a GPU, and the models run on the CPU: ")
    assert errors("cpu") == [], "the CPU was asked for"
    monkeypatch.setattr(presets, "GPU_NODES", ("no-such-node",))
    assert errors("auto") == []
