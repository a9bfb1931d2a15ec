"""From the state of a job to its message."""

from darkroom.v1 import generation_pb2
from darkroom_server.core.errors import Failure, GenerationFailed, Reason
from darkroom_server.rpc.responses import duration_message
from darkroom_server.service.jobs import Generation, GenerationState

STATES = {
    GenerationState.QUEUED: generation_pb2.GENERATION_STATE_QUEUED,
    GenerationState.RUNNING: generation_pb2.GENERATION_STATE_RUNNING,
    GenerationState.FINISHED: generation_pb2.GENERATION_STATE_FINISHED,
    GenerationState.FAILED: generation_pb2.GENERATION_STATE_FAILED,
    GenerationState.EXPIRED: generation_pb2.GENERATION_STATE_EXPIRED,
    GenerationState.CANCELLED: generation_pb2.GENERATION_STATE_CANCELLED,
}

STATES_FROM_WIRE = {number: state for state, number in STATES.items()}


def generation_of(message: generation_pb2.Generation) -> Generation:
    """What ``generation_message`` made the message of, at another server."""
    error = None
    if message.error_reason:
        known = message.error_reason in Reason.__members__
        reason = Reason(message.error_reason) if known else Reason.INTERNAL
        error = GenerationFailed(Failure(reason, message.error_message))
    finish = message.estimated_finish if message.HasField("estimated_finish") else None
    return Generation(
        request_id=message.request_id,
        state=STATES_FROM_WIRE[message.state],
        model=message.model,
        image_count=message.image_count,
        finished_images=message.finished_images,
        step=message.step,
        steps=message.steps,
        position=message.queue_position if message.HasField("queue_position") else None,
        age=message.age.ToNanoseconds() / 1e9,
        estimated_finish=None if finish is None else finish.ToNanoseconds() / 1e9,
        error=error,
    )


def generation_message(generation: Generation) -> generation_pb2.Generation:
    """``generation`` as a message."""
    error, finish = generation.error, generation.estimated_finish
    return generation_pb2.Generation(
        request_id=generation.request_id,
        state=STATES[generation.state],
        model=generation.model,
        image_count=generation.image_count,
        finished_images=generation.finished_images,
        step=generation.step,
        steps=generation.steps,
        queue_position=generation.position,
        age=duration_message(generation.age),
        estimated_finish=None if finish is None else duration_message(finish),
        error_reason="" if error is None else str(error.reason),
        error_message="" if error is None else str(error),
    )
