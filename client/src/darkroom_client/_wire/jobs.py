"""Decode the state of jobs."""

from dataclasses import dataclass

from darkroom.v1 import generation_pb2
from darkroom_client._types.job import Job, JobState
from darkroom_client._wire.values import decode_seconds

_STATE_PREFIX = "GENERATION_STATE_"


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs; ``next_token`` is "" on the last page."""

    jobs: tuple[Job, ...]
    next_token: str


def decode_page(response: generation_pb2.ListGenerationsResponse) -> JobPage:
    """Decode one page of jobs."""
    return JobPage(
        tuple(decode_job(generation) for generation in response.generations),
        response.next_page_token,
    )


def decode_job(generation: generation_pb2.Generation) -> Job:
    """Decode the state of a job."""
    known_finish = generation.HasField("estimated_finish")
    return Job(
        request_id=generation.request_id,
        state=_decode_state(generation.state),
        model=generation.model,
        image_count=generation.image_count,
        finished_images=generation.finished_images,
        step=generation.step,
        steps=generation.steps,
        queue_position=(
            generation.queue_position if generation.HasField("queue_position") else None
        ),
        age=decode_seconds(generation.age),
        estimated_finish=decode_seconds(generation.estimated_finish) if known_finish else None,
        error_reason=generation.error_reason,
        error_message=generation.error_message,
    )


def _decode_state(number: generation_pb2.GenerationState.ValueType) -> JobState:
    known = generation_pb2.GenerationState.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_STATE_PREFIX) if known else ""
    return JobState.__members__.get(name, JobState.UNKNOWN)
