"""What a request would take, without drawing it."""

import time

from darkroom.v1 import generation_pb2
from darkroom_server.core.caller import Caller
from darkroom_server.dispatch import Dispatcher
from darkroom_server.rpc.models import resolve_model
from darkroom_server.rpc.responses import duration_message
from darkroom_server.rpc.validation import job_of


def estimate_of(
    request: generation_pb2.GenerateRequest, caller: Caller, dispatcher: Dispatcher
) -> generation_pb2.EstimateGenerationResponse:
    """The times and the memory that ``request`` would take now.

    Raises ``DarkroomError``, as the request itself would, but for what only the moment forbids.
    """
    model = dispatcher.model(resolve_model(request.model, list(dispatcher.models)))
    job = job_of(
        request,
        model,
        job_id="",  # No job that is here has it.
        submitted_at=time.monotonic(),
        deadline=None,
        caller=caller,
    )
    estimate = dispatcher.estimate(job)
    # Its images share passes, as far as those go.
    widest = model.rows_of_a_pass(job.width, job.height)
    rows = min(job.rows_per_image * job.image_count, widest)
    response = generation_pb2.EstimateGenerationResponse(
        peak_bytes=model.memory.needed(job.width, job.height, rows),
        available_bytes=model.memory.available_bytes,
    )
    if estimate is not None:
        response.queue_wait.CopyFrom(duration_message(estimate.queue_wait))
        response.run_time.CopyFrom(duration_message(estimate.run_time))
    return response
