"""``darkroom jobs``: the caller's jobs, with their state, step and place in the queue."""

import argparse
import dataclasses
import itertools
import json

from darkroom_client._types.job import Job
from darkroom_client.cli._connect import connect
from darkroom_client.cli.terminal._console import open_console, tabulate

_COLUMNS = ("job", "state", "model", "images", "steps", "ahead", "age", "remaining", "error")


def run(arguments: argparse.Namespace) -> int:
    """Print the jobs: a table on a terminal, tab-separated lines in a pipe, or JSON lines."""
    if arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}, must be at least 1")
    with connect(arguments) as client:
        if arguments.request_ids:
            jobs = [client.job(request_id) for request_id in arguments.request_ids]
        else:
            jobs = list(itertools.islice(client.jobs(), arguments.limit))
    if arguments.json:
        for job in jobs:
            print(json.dumps(dataclasses.asdict(job)))
    else:
        tabulate(open_console(), _COLUMNS, [_row(job) for job in jobs])
    return 0


def _row(job: Job) -> tuple[str, ...]:
    """A row for ``_COLUMNS``."""
    finish = job.estimated_finish
    return (
        job.request_id,
        job.state,
        job.model,
        f"{job.finished_images} of {job.image_count}",
        f"{job.step} of {job.steps}",
        "-" if job.queue_position is None else str(job.queue_position),
        f"{job.age:.1f} s",
        "-" if finish is None else f"{finish:.1f} s",
        f"{job.error_reason}: {job.error_message}" if job.error_reason else "-",
    )
