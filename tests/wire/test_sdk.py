"""The Python client against a real server and demo model: streams, submit, estimate, status."""

import time
from pathlib import Path

import pytest

from darkroom_client import (
    Accepted,
    Cancelled,
    Client,
    Finished,
    ImageReady,
    InvalidRequest,
    JobState,
    Preview,
    Progress,
    ReplayRecord,
    ServerState,
    UnknownRequest,
)

PROMPT = "a large yellow star on a blue background"
SECONDS = 240.0


def test_a_stream_with_previews(address: str) -> None:
    with (
        Client(address, timeout=SECONDS) as client,
        client.stream(PROMPT, seed=7, steps=4, preview_every=2) as stream,
    ):
        events = list(stream)
        alone = client.generate(PROMPT, seed=7, steps=4)

    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Finished)
    assert [event.step for event in events if isinstance(event, Progress)][-1] == 4
    (ready,) = [event for event in events if isinstance(event, ImageReady)]
    assert ready.image.replay.pixels_sha256 == alone.images[0].replay.pixels_sha256
    assert any(event.data for event in events if isinstance(event, Preview))


def test_a_field_that_the_model_does_not_take_is_rejected(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        model = client.model()
        takes = ", ".join(model.optional_fields)
        with pytest.raises(InvalidRequest) as caught:
            client.generate(PROMPT, steps=4, true_cfg_scale=4.0, prompt_2="a moon")
        says = f"model {model.id!r} does not take it; it takes {takes}"
        violations = {each.field: each.description for each in caught.value.violations}
        assert violations == {"true_cfg_scale": says, "prompt_2": says}
        assert {"negative_prompt", "guidance_scale", "preview"} <= {*model.optional_fields}
        guided = client.generate(PROMPT, steps=2, seed=7, guidance_scale=3.0, negative_prompt="red")
        assert guided.image.replay.request.true_cfg_scale is None
        assert model.guidance is not None
        assert guided.image.replay.rows_in_last_pass == model.guidance.rows == 2


def test_submit_watch_and_cancel(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        accepted = client.submit(PROMPT, seed=7, steps=4, time_limit=SECONDS)
        with client.watch(accepted.request_id) as watch:
            assert watch.result().images[0].seed == 7
        assert client.cancel(accepted.request_id) is False

        long = client.submit(PROMPT, steps=150)
        assert client.cancel(long.request_id) is True


def test_closing_a_stream_cancels_its_job(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        with client.stream(PROMPT, steps=150) as stream:
            for event in stream:
                if isinstance(event, Progress):
                    break
        try:
            with client.watch(stream.request_id) as watch:
                steps = [event.step for event in watch if isinstance(event, Progress)]
        except (Cancelled, UnknownRequest):
            steps = []

    assert len(steps) < 5


def test_estimate_and_status(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        client.generate(PROMPT, steps=2)
        few, many = (client.estimate(PROMPT, steps=steps) for steps in (5, 50))
        status = client.status()

    assert 0 < few.run_time < many.run_time
    assert few.available_bytes > 0
    assert status.state is ServerState.READY
    assert status.models[0].ready
    assert status.ended_jobs["finished"] >= 1
    assert status.engines[0].ready


def test_a_job_without_a_watcher(address: str) -> None:
    with Client(address, timeout=SECONDS) as client:
        request_id = client.submit(PROMPT, seed=7, steps=150).request_id
        while (job := client.job(request_id)).step == 0:
            assert not job.ended
            time.sleep(0.01)
        assert (job.state, job.steps) == (JobState.RUNNING, 150)
        assert request_id in [each.request_id for each in client.jobs()]
        assert client.cancel(request_id)
        assert client.job(request_id).state is JobState.CANCELLED


def test_a_picture_holds_its_record(address: str, tmp_path: Path) -> None:
    with Client(address, timeout=SECONDS) as client:
        for format in ("png", "jpeg", "webp"):
            second = client.generate(
                PROMPT,
                seed=7,
                image_count=2,
                steps=3,
                format=format,
                exact=True,
                embed_record=True,
            ).images[1]
            path = second.save(tmp_path / f"star{second.format.suffixes[0]}")
            record = ReplayRecord.from_file(path)
            assert record.differences(second.replay) == {}
            assert client.replay(record).images[0].data == second.data
