"""Decode the status of a server, and estimates."""

from datetime import UTC

from darkroom.v1 import generation_pb2, server_pb2
from darkroom_client._types.status import (
    EngineStatus,
    Estimate,
    ModelStatus,
    PassTime,
    ServerState,
    ServerStatus,
)
from darkroom_client._wire.models import (
    decode_load,
    decode_row_limit_source,
    decode_runtime,
    decode_state,
)
from darkroom_client._wire.values import decode_seconds

_STATE_PREFIX = "SERVER_STATE_"


def decode_status(status: server_pb2.GetStatusResponse) -> ServerStatus:
    """Decode the status."""
    return ServerStatus(
        version=status.version,
        uptime=decode_seconds(status.uptime),
        state=_decode_state(status.state),
        models=tuple(_decode_model(model) for model in status.models),
        engines=tuple(_decode_engine(engine) for engine in status.engines),
        queued_jobs=status.queued_jobs,
        max_queued_jobs=status.max_queued_jobs,
        running_jobs=status.running_jobs,
        accepted_jobs=status.accepted_jobs,
        ended_jobs=dict(sorted(status.ended_jobs.items())),
        host_memory_bytes=status.host_memory_bytes,
    )


def decode_estimate(estimate: generation_pb2.EstimateGenerationResponse) -> Estimate:
    """Decode the estimate."""
    return Estimate(
        queue_wait=decode_seconds(estimate.queue_wait),
        run_time=decode_seconds(estimate.run_time),
        peak_bytes=estimate.peak_bytes,
        available_bytes=estimate.available_bytes,
    )


def _decode_state(number: server_pb2.ServerState.ValueType) -> ServerState:
    known = server_pb2.ServerState.DESCRIPTOR.values_by_number.get(number)
    name = known.name.removeprefix(_STATE_PREFIX) if known else ""
    return ServerState.__members__.get(name, ServerState.UNKNOWN)


def _decode_model(model: server_pb2.ModelStatus) -> ModelStatus:
    return ModelStatus(
        id=model.id,
        ready=model.ready,
        queued_jobs=model.queued_jobs,
        running_jobs=model.running_jobs,
        pass_times=tuple(
            PassTime(
                width=time.width,
                height=time.height,
                rows=time.rows,
                seconds=decode_seconds(time.time),
            )
            for time in model.pass_times
        ),
        runtime=decode_runtime(model.runtime) if model.HasField("runtime") else None,
        max_rows=model.max_rows,
        row_limit_source=decode_row_limit_source(model.row_limit_source),
        state=decode_state(model),
        state_reason=model.state_reason,
        weight_bytes=model.weight_bytes,
        last_used=model.last_used.ToDatetime(UTC) if model.HasField("last_used") else None,
        pinned=model.pinned,
        load=decode_load(model.load) if model.HasField("load") else None,
    )


def _decode_engine(engine: server_pb2.EngineStatus) -> EngineStatus:
    return EngineStatus(
        index=engine.index,
        device=engine.device,
        ready=engine.ready,
        restarts=engine.restarts,
        jobs=engine.jobs,
        samples=engine.samples,
        rows_in_use=engine.rows_in_use,
        memory_bytes=dict(sorted(engine.memory_bytes.items())),
        host_memory_bytes=engine.host_memory_bytes,
        weight_bytes=dict(sorted(engine.weight_bytes.items())),
    )
