"""From the state of a job to its message."""

from darkroom.v1 import generation_pb2
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
