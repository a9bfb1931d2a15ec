"""The Python client against a real server and demo model: streams, submit, estimate, status."""

import time
from pathlib import Path

from darkroom_client import (
    Accepted,
    Cancelled,
    Client,
    Finished,
    ImageReady,
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
