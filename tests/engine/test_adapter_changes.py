"""Adapters that come and go while the engine serves jobs."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from darkroom_server.backends.thread import ThreadEngine
from darkroom_server.core.engine_config import AdapterSource
from darkroom_server.core.errors import Reason
from darkroom_server.core.events import (
    AdapterChecked,
    AdapterEvicted,
    AdapterLoaded,
    EngineReady,
    Event,
    JobCancelled,
    JobFailed,
    JobFinished,
    SampleProgress,
)
from darkroom_server.core.inputs import Lora
from darkroom_server.core.job import Job
from darkroom_server.engine.adapters import store
from darkroom_server.ipc.commands import CheckAdapter, OfferAdapter, WithdrawAdapter

from .adapter_files import write_adapter
from .conftest import LoopUnderTest, config_for, make_job


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.fixture(scope="module")
def loop(tiny_folder: Path) -> Iterator[LoopUnderTest]:
    """Without adapters at its start; each test names its own."""
    made = LoopUnderTest(
        config_for(tiny_folder, adapters_may_come=True, max_lora_rank=8, max_request_loras=3)
    )
    yield made
    made.close()


def source(file: Path) -> AdapterSource:
    return AdapterSource(id=file.stem, location=str(file), from_folder=True)


def job(name: str, *loras: str, **fields: Any) -> Job:
    return make_job(name, loras=tuple(Lora(id=id) for id in loras), **fields)


def checked(loop: LoopUnderTest, file: Path) -> AdapterChecked:
    loop.loop.change_adapters(CheckAdapter(source(file)))
    loop.wait_for(lambda: bool(checks(loop, file.stem)))
    (check,) = checks(loop, file.stem)
    return check


def checks(loop: LoopUnderTest, id: str) -> list[AdapterChecked]:
    return [e for e in loop.events if isinstance(e, AdapterChecked) and e.adapter == id]


def is_evicted(loop: LoopUnderTest, id: str) -> bool:
    return AdapterEvicted("tiny", id) in loop.events


def test_an_engine_finds_the_models_that_an_adapter_fits(
    loop: LoopUnderTest, pipeline: Any, tmp_path: Path
) -> None:
    info = loop.models["tiny"].info
    assert "loras" in info.optional_fields
    assert info.limits.max_loras == 3
    fits = checked(loop, write_adapter(tmp_path / "fits.safetensors", pipeline, rank=4))
    assert (fits.file, fits.reason) == (str(tmp_path / "fits.safetensors"), "")
    assert (fits.offers["tiny"].rank, fits.offers["tiny"].rejection) == (4, "")
    assert fits.offers["tiny"].bytes > 0
    large = checked(loop, write_adapter(tmp_path / "large.safetensors", pipeline, rank=9))
    assert large.offers["tiny"].rejection == "its rank is 9, the server takes 8"
    (tmp_path / "noise.safetensors").write_bytes(b"x" * 100)
    for name, complaint in (("noise", "not a safetensors file"), ("missing", "is not there")):
        none = checked(loop, tmp_path / f"{name}.safetensors")
        assert not none.offers
        assert complaint in none.reason


def test_a_file_that_diffusers_cannot_convert_costs_no_job(
    loop: LoopUnderTest, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("no such layer")

    file = write_adapter(tmp_path / "odd.safetensors", pipeline)
    loop.loop.change_adapters(OfferAdapter(source(file)))
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "lora_state_dict", fail)
        assert "cannot convert it (AttributeError)" in checked(loop, file).reason
        ends = loop.run(job("odd", "odd"), job("beside-odd"))
    failed = ends["odd"]
    assert isinstance(failed, JobFailed)
    assert failed.failure.reason is Reason.ADAPTER_UNUSABLE
    assert "cannot convert it (AttributeError)" in failed.failure.message
    assert isinstance(ends["beside-odd"], JobFinished)
    assert isinstance(loop.run(job("after-odd", "odd"))["after-odd"], JobFinished)


def test_a_withdrawn_adapter_stays_while_jobs_use_it_and_is_freed_then(
    loop: LoopUnderTest, pipeline: Any, tmp_path: Path
) -> None:
    file = write_adapter(tmp_path / "leaves.safetensors", pipeline)
    loop.loop.change_adapters(OfferAdapter(source(file)))
    loop.run(job("leaves-1", "leaves"))
    assert not is_evicted(loop, "leaves")

    def withdraw(event: Event) -> None:
        if isinstance(event, SampleProgress) and (event.job_id, event.step) == ("leaves-2", 1):
            loop.loop.change_adapters(WithdrawAdapter("leaves"))

    loop.on_event = withdraw
    loop.run(job("leaves-2", "leaves"))
    loop.on_event = lambda _: None
    loop.wait_for(lambda: is_evicted(loop, "leaves"))
    kept = loop.events.index(loop.progress("leaves-2")[-1])
    assert loop.events.index(AdapterEvicted("tiny", "leaves")) > kept
    assert torch.equal(loop.latents["leaves-2", 0], loop.latents["leaves-1", 0])

    # One that was accepted before and comes to the engine now still finds it.
    late = loop.run(job("leaves-3", "leaves"))["leaves-3"]
    assert isinstance(late, JobFinished)
    assert torch.equal(loop.latents["leaves-3", 0], loop.latents["leaves-1", 0])
    loop.wait_for(lambda: loop.events.count(AdapterEvicted("tiny", "leaves")) == 2)


def test_a_new_file_of_the_same_name_has_its_own_weights(
    loop: LoopUnderTest, pipeline: Any, tmp_path: Path
) -> None:
    """Of the denoiser, and of the text encoder, whose embeddings are cached by name."""
    file = write_adapter(tmp_path / "same.safetensors", pipeline, seed=1)
    loop.loop.change_adapters(OfferAdapter(source(file)))
    loop.run(job("same-old", "same"))
    write_adapter(file, pipeline, seed=2)
    loop.run(job("same-kept", "same"))
    assert torch.equal(loop.latents["same-kept", 0], loop.latents["same-old", 0])
    loop.loop.change_adapters(OfferAdapter(source(file)))
    loop.run(job("same-new", "same"))
    other = write_adapter(tmp_path / "other.safetensors", pipeline, seed=2)
    loop.loop.change_adapters(OfferAdapter(source(other)))
    loop.run(job("same-other", "other"))
    assert torch.equal(loop.latents["same-new", 0], loop.latents["same-other", 0])
    assert not torch.equal(loop.latents["same-new", 0], loop.latents["same-old", 0])


def test_a_read_that_began_before_a_file_was_replaced_is_repeated(
    loop: LoopUnderTest, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_read, goes_on = threading.Event(), threading.Event()
    read = store.AdapterStore._read

    def slow(self: Any, key: Any, file: Path) -> None:
        receive = self._receive

        def receive_later(found: Any) -> None:
            has_read.set()
            assert goes_on.wait(60)
            receive(found)

        self._receive = receive_later
        try:
            read(self, key, file)
        finally:
            self._receive = receive

    monkeypatch.setattr(store.AdapterStore, "_read", slow)
    file = write_adapter(tmp_path / "slow.safetensors", pipeline, seed=1)
    loop.loop.change_adapters(OfferAdapter(source(file)))
    loop.loop.submit(job("slow-old", "slow"))
    assert has_read.wait(60)
    loop.loop.cancel("slow-old")
    loop.wait_for(lambda: "slow-old" in loop.ends)
    assert isinstance(loop.ends["slow-old"], JobCancelled)
    write_adapter(file, pipeline, seed=2)
    loop.loop.change_adapters(OfferAdapter(source(file)))
    loop.loop.submit(job("slow-new", "slow"))
    loop.run(job("slow-none"))  # The engine has the commands above now.
    goes_on.set()
    loop.wait_for(lambda: "slow-new" in loop.ends)
    other = write_adapter(tmp_path / "slow-other.safetensors", pipeline, seed=2)
    loop.loop.change_adapters(OfferAdapter(source(other)))
    loop.run(job("slow-wanted", "slow-other"))
    assert torch.equal(loop.latents["slow-new", 0], loop.latents["slow-wanted", 0])


def test_an_adapter_of_the_start_may_be_withdrawn_before_it(
    tiny_folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    """So it is in an engine that restarts: for jobs that wait, and freed after them."""
    there = source(write_adapter(tmp_path / "there.safetensors", pipeline))
    config = config_for(tiny_folder, adapters_may_come=True).with_adapter(there)
    config = config.with_adapter(AdapterSource(id="gone", location=str(tmp_path / "gone")))
    made = LoopUnderTest(config.without_adapter("there").without_adapter("gone"))
    try:
        assert made.models["tiny"].info.adapters == ()
        ends = made.run(job("one", "there"), job("two", "gone"))
        assert isinstance(ends["one"], JobFinished)
        assert isinstance(ends["two"], JobFailed)
        made.wait_for(lambda: is_evicted(made, "there"))
    finally:
        made.close()


def test_an_engine_that_still_loads_learns_of_an_adapter(
    tiny_folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    ended = threading.Event()
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, EngineReady):
            engine.submit(job("one", "early"))
        if isinstance(event, JobFinished | JobFailed):
            ended.set()

    engine = ThreadEngine(config_for(tiny_folder, adapters_may_come=True))
    engine.start(emit)
    engine.offer_adapter(source(write_adapter(tmp_path / "early.safetensors", pipeline)))
    try:
        assert ended.wait(120)
    finally:
        engine.close()
    assert any(isinstance(e, JobFinished) for e in events)
    assert any(isinstance(e, AdapterLoaded) for e in events)
