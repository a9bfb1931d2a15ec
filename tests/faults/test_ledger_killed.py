"""A server with a ledger is killed by SIGKILL: it starts again and finishes all it had accepted."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

from darkroom_client import AsyncClient
from darkroom_client import Image as ClientImage
from tests.server.app.process import ServerProcess, start

JOBS = 20
STEPS = 6
PASS_SECONDS = 0.02


def flags(path: Path) -> list[str]:
    room = ["--max-resident-samples", "4", "--max-queued-jobs", str(JOBS)]
    return ["--ledger", f"sqlite:{path}", *room, "--log-format", "json"]


async def accept_all(client: AsyncClient) -> tuple[list[str], list[Any]]:
    """Submit the jobs, a third of them as streams that nobody reads on; their ids."""
    streams: list[Any] = []
    ids = [f"job-{number}" for number in range(JOBS)]

    async def accept(number: int, id: str) -> None:
        options: dict[str, Any] = {"request_id": id, "steps": STEPS, "seed": number}
        if number % 3:
            await client.submit(f"star {number}", **options)
        else:
            streams.append(client.stream(f"star {number}", **options))
            await streams[-1].__aenter__()  # Its end would cancel the job.
            await anext(streams[-1])

    await asyncio.gather(*(accept(number, id) for number, id in enumerate(ids)))
    return ids, streams


def runs(lines: list[str], id: str) -> int:
    """How often an engine got the job ``id``."""
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return sum(entry["event"] == "submitted" and entry["job"] == id for entry in entries)


async def test_twenty_accepted_jobs_survive_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with start(*flags(path), pass_seconds=PASS_SECONDS) as first:
        async with AsyncClient(address(first)) as client:
            ids, _streams = await accept_all(client)
            await client.result(ids[1])
            first.send(signal.SIGKILL)
            await asyncio.to_thread(first.wait)
        first.rest()
    with start(*flags(path), pass_seconds=PASS_SECONDS) as second:
        async with AsyncClient(address(second)) as client:
            results = await asyncio.gather(*(client.result(id, 60) for id in ids))
            fresh = await asyncio.gather(
                *(
                    client.generate(f"star {number}", steps=STEPS, seed=number)
                    for number in range(JOBS)
                )
            )
        second.send(signal.SIGTERM)
        second.wait()
        second.rest()
    assert [data(each.image) for each in results] == [data(each.image) for each in fresh]
    assert len({data(each.image) for each in results}) == JOBS
    # A job that was taken up again may be submitted before the server says that it serves.
    counted = [runs([*first.lines, *second.lines], id) for id in ids]
    assert set(counted) <= {1, 2}, counted


def data(image: ClientImage) -> bytes:
    return image.data


def address(server: ServerProcess) -> str:
    found: str = server.until("serving")["address"]
    return found
