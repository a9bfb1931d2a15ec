"""Jobs for tests, made without a request."""

import time
from dataclasses import replace
from typing import Any

from darkroom_server.core.job import ImageFormat, Job, SchedulerName


def make_job(id: str = "job", **changes: Any) -> Job:
    job = Job(
        id=id,
        model="demo",
        prompt="a star",
        negative_prompt="",
        width=64,
        height=64,
        steps=4,
        guidance_scale=7.5,
        seed=7,
        image_count=1,
        scheduler=SchedulerName.DDIM,
        format=ImageFormat.PNG,
        quality=90,
        exact=False,
        submitted_at=time.monotonic(),
    )
    return replace(job, **changes)
