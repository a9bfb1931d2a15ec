"""Adapters in the engine: read while their jobs wait, evicted, bounded in a batch, and rejected."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.tiny_families.stable_diffusion_xl import write_sdxl
from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.engine_config import AdapterSource, EngineConfig
from darkroom_server.core.errors import Reason, StartupError
from darkroom_server.core.events import (
    AdapterEvicted,
    AdapterLoaded,
    BatchDone,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
)
from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters import store
from darkroom_server.engine.adapters.layers import AdaptedLayer

from .adapter_files import write_adapter
from .conftest import LoopUnderTest, config_for, make_job

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(folder / f"{name}.safetensors", pipeline, rank=4, seed=seed)
    return folder


def config(model: Path, adapters: Path, **fields: Any) -> EngineConfig:
    sources = [
        AdapterSource(id=name, location=str(adapters / f"{name}.safetensors")) for name in NAMES
    ]
    return config_for(model, **{"adapters": tuple(sources), **fields})


@pytest.fixture
def loop(tiny_folder: Path, adapters: Path) -> Iterator[LoopUnderTest]:
    """Room for two adapters in a batch, and in memory for one."""
    made = LoopUnderTest(config(tiny_folder, adapters, max_loras=2, lora_cache_bytes=1))
    yield made
    made.close()


def job(name: str, *loras: str, **fields: Any) -> Job:
    return make_job(name, loras=tuple(Lora(id=id) for id in loras), **fields)


def test_a_model_lists_the_adapters_that_fit_it(loop: LoopUnderTest) -> None:
    info = loop.models["tiny"].info
    assert [offer.id for offer in info.adapters] == list(NAMES)
    assert {(offer.kind, offer.rank, offer.rejection) for offer in info.adapters} == {
        (AdapterKind.LORA, 4, "")
    }
    assert info.limits.max_loras == 2
    assert "loras" in info.optional_fields
    loop.run(job("one", "a"))
    (loaded,) = [e for e in loop.events if isinstance(e, AdapterLoaded)]
    assert loaded.bytes == info.adapters[0].bytes > 0


def test_an_adapter_is_evicted_when_another_one_needs_its_place(loop: LoopUnderTest) -> None:
    for name, id in (("first", "a"), ("second", "b"), ("third", "a")):
        loop.run(job(name, id))
    changes = [
        (type(e), e.adapter) for e in loop.events if isinstance(e, AdapterLoaded | AdapterEvicted)
    ]
    assert changes == [
        (AdapterLoaded, "a"),
        (AdapterLoaded, "b"),
        (AdapterEvicted, "a"),
        (AdapterLoaded, "a"),
        (AdapterEvicted, "b"),
    ]
    adapters = loop.models["tiny"].adapters
    assert adapters is not None
    assert list(adapters.resident) == ["a"]
    first, third = (loop.latents[name, 0] for name in ("first", "third"))
    assert torch.equal(first, third)
    assert not torch.equal(first, loop.latents["second", 0])


def test_a_job_in_the_engine_keeps_its_adapters(loop: LoopUnderTest) -> None:
    """Both exceed the limit, and neither is evicted while its job runs."""
    ends = loop.run(job("both", "a", "b"), job("other", "b", "a"))
    assert all(isinstance(end, JobFinished) for end in ends.values())
    assert not any(isinstance(e, AdapterEvicted) for e in loop.events)


def test_a_batch_has_at_most_max_loras_adapters(loop: LoopUnderTest) -> None:
    jobs = [job(f"job-{name}", name) for name in NAMES]
    ends = loop.run(*jobs, job("none"))
    assert all(isinstance(end, JobFinished) for end in ends.values())
    batches = [e for e in loop.events if isinstance(e, BatchDone)]
    assert max(batch.adapters for batch in batches) == 2


def test_other_jobs_run_while_an_adapter_is_read(
    loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_ran, read = threading.Event(), store.AdapterStore._read

    def slow(self: Any, *args: Any) -> None:
        assert other_ran.wait(60)
        read(self, *args)

    monkeypatch.setattr(store.AdapterStore, "_read", slow)
    loop.loop.submit(job("waits", "a"))
    assert isinstance(loop.run(job("other"))["other"], JobFinished)
    assert not any(isinstance(e, JobStarted) and e.job_id == "waits" for e in loop.events)
    other_ran.set()
    loop.wait_for(lambda: "waits" in loop.ends)
    assert isinstance(loop.ends["waits"], JobFinished)


def test_a_job_can_be_cancelled_while_its_adapter_is_read(
    loop: LoopUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, read = threading.Event(), store.AdapterStore._read

    def slow(self: Any, *args: Any) -> None:
        assert cancelled.wait(60)
        read(self, *args)

    monkeypatch.setattr(store.AdapterStore, "_read", slow)
    loop.loop.submit(job("cancelled", "a"))
    loop.loop.cancel("cancelled")
    loop.wait_for(lambda: "cancelled" in loop.ends)
    assert isinstance(loop.ends["cancelled"], JobCancelled)
    cancelled.set()
    assert isinstance(loop.run(job("next", "a"))["next"], JobFinished)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda file: file.write_bytes(b"x" * 100), "it is not a safetensors file"),
    ],
)
def test_a_job_fails_if_its_adapter_cannot_be_read_and_others_do_not(
    spoil: Any, why: str, tiny_folder: Path, adapters: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.safetensors").write_bytes(
            (adapters / f"{name}.safetensors").read_bytes()
        )
    loop = LoopUnderTest(config(tiny_folder, tmp_path))
    try:
        spoil(tmp_path / "a.safetensors")
        ends = loop.run(job("broken", "a", "b"), job("whole", "b"))
        failed = ends["broken"]
        assert isinstance(failed, JobFailed)
        assert failed.failure.reason is Reason.ADAPTER_UNUSABLE
        assert f"adapter 'a' cannot be used any more: {why}" in failed.failure.message
        assert str(tmp_path) not in failed.failure.message
        assert isinstance(ends["whole"], JobFinished)
    finally:
        loop.close()


def test_a_rank_above_the_limit_is_offered_as_rejected(tiny_folder: Path, adapters: Path) -> None:
    loop = LoopUnderTest(config(tiny_folder, adapters, max_lora_rank=3))
    try:
        offers = loop.models["tiny"].info.adapters
        assert {offer.rejection for offer in offers} == {"its rank is 4, the server takes 3"}
    finally:
        loop.close()


def test_an_adapter_that_fits_no_model_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    other = diffusers.StableDiffusionXLPipeline.from_pretrained(write_sdxl(tmp_path / "sdxl"))
    file = write_adapter(tmp_path / "other.safetensors", other)
    source = AdapterSource(id="other", location=str(file))
    with pytest.raises(StartupError, match="fits no model"):
        LoopUnderTest(config_for(tiny_folder, adapters=(source,)))
    found = dataclasses.replace(source, from_folder=True)
    loop = LoopUnderTest(config_for(tiny_folder, adapters=(found,)))
    try:
        assert loop.models["tiny"].info.adapters == ()
    finally:
        loop.close()


def test_an_engine_starts_again_though_an_adapter_is_damaged_or_gone_by_now(
    tiny_folder: Path, adapters: Path, tmp_path: Path
) -> None:
    """Its server runs: the jobs with that adapter fail, and no others."""
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    gone = tmp_path / "gone.safetensors"
    files = (adapters / "a.safetensors", tmp_path / "damaged.safetensors", gone)
    sources = tuple(AdapterSource(id=file.stem, location=str(file)) for file in files)
    first = config_for(tiny_folder, adapters=sources)
    for left_out in (sources[1:2], sources[2:]):
        with pytest.raises(StartupError, match=left_out[0].id):
            LoopUnderTest(dataclasses.replace(first, adapters=left_out))
    loop = LoopUnderTest(first.with_measurements((), "cpu"))
    try:
        assert [offer.id for offer in loop.models["tiny"].info.adapters] == ["a"]
        ends = loop.run(job("whole", "a"), job("one", "damaged"), job("two", "gone"))
        assert isinstance(ends["whole"], JobFinished)
        for name in ("one", "two"):
            failed = ends[name]
            assert isinstance(failed, JobFailed)
            assert failed.failure.reason is Reason.ADAPTER_UNUSABLE
    finally:
        loop.close()


def test_a_server_without_adapters_changes_no_layer(shared_loop: LoopUnderTest) -> None:
    model = shared_loop.models["tiny"]
    assert model.adapters is None
    assert "loras" not in model.info.optional_fields
    assert not changed_layers(model.unet)


def test_layers_are_changed_when_the_first_adapter_arrives(loop: LoopUnderTest) -> None:
    unet = loop.models["tiny"].unet
    loop.run(job("none"))
    assert not changed_layers(unet)
    loop.run(job("one", "a"))
    assert changed_layers(unet)


def changed_layers(unet: Any) -> list[Any]:
    """The layers to which adapters are added."""
    forwards = {layer: vars(layer).get("forward") for layer in unet.modules()}
    return [
        layer
        for layer, forward in forwards.items()
        if isinstance(getattr(forward, "__self__", None), AdaptedLayer)
    ]


def test_a_prompt_is_encoded_again_with_the_adapters_of_its_encoder(loop: LoopUnderTest) -> None:
    encoder = loop.models["tiny"].prompts
    encode, texts = encoder._encode, []

    def counted(batch: list[str]) -> Any:
        texts.extend(batch)
        return encode(batch)

    encoder._encode = counted  # type: ignore[assignment, method-assign]
    for name, loras in (("plain", ()), ("with", ("a",)), ("other", ("b",)), ("again", ("a",))):
        loop.run(job(name, *loras, prompt="a blue ring"))
    assert texts.count("a blue ring") == 3
