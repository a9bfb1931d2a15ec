"""ServerService: how the server is, for operators."""

import time
from importlib.metadata import version

import psutil

from darkroom.v1 import model_pb2, server_pb2, server_pb2_grpc
from darkroom_server.dispatch import Dispatcher, EngineStatus, ModelStatus, State
from darkroom_server.rpc.context import Context
from darkroom_server.rpc.enums import SOURCE_TO_WIRE
from darkroom_server.rpc.models import runtime_message, set_place
from darkroom_server.rpc.responses import duration_message

STATES = {
    State.LOADING: server_pb2.SERVER_STATE_LOADING,
    State.READY: server_pb2.SERVER_STATE_READY,
    State.RECOVERING: server_pb2.SERVER_STATE_RECOVERING,
    State.DRAINING: server_pb2.SERVER_STATE_DRAINING,
}


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Answers from what the engines reported; never asks them. With tokens, for admins only."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._process = psutil.Process()

    async def GetStatus(
        self, request: server_pb2.GetStatusRequest, context: Context
    ) -> server_pb2.GetStatusResponse:
        """Everything, at this moment."""
        now = self._dispatcher.snapshot()
        return server_pb2.GetStatusResponse(
            version=version("darkroom-server"),
            uptime=duration_message(max(0.0, time.time() - self._process.create_time())),
            state=STATES[now.state],
            models=[_model(model) for model in now.models],
            engines=[_engine(engine) for engine in now.engines],
            queued_jobs=now.queued_jobs,
            max_queued_jobs=now.max_queued_jobs,
            running_jobs=now.running_jobs,
            accepted_jobs=now.accepted_jobs,
            ended_jobs=now.ended_jobs,
            host_memory_bytes=self._process.memory_info().rss,
        )


def _model(model: ModelStatus) -> server_pb2.ModelStatus:
    # Of a model that is not in memory, how it runs is not known: see ``Model.runtime``.
    info = model.info if model.place.ready else None
    message = server_pb2.ModelStatus(
        id=model.id,
        queued_jobs=model.queued_jobs,
        running_jobs=model.running_jobs,
        pass_times=[
            server_pb2.PassTime(
                width=each.width,
                height=each.height,
                rows=each.rows,
                time=duration_message(each.seconds),
            )
            for each in model.batch_times
        ],
        runtime=runtime_message(info) if info else None,
        max_rows=info.limits.max_rows if info else 0,
        row_limit_source=(
            SOURCE_TO_WIRE[info.limits.row_limit_source]
            if info
            else model_pb2.ROW_LIMIT_SOURCE_UNSPECIFIED
        ),
    )
    set_place(message, model.place)
    return message


def _engine(engine: EngineStatus) -> server_pb2.EngineStatus:
    memory = engine.memory
    return server_pb2.EngineStatus(
        index=engine.index,
        device=engine.device,
        ready=engine.ready,
        restarts=engine.restarts,
        jobs=engine.jobs,
        samples=engine.samples,
        rows_in_use=engine.rows_in_use,
        memory_bytes=memory.by_kind if memory else {},
        host_memory_bytes=memory.host_rss if memory else 0,
        weight_bytes=engine.weight_bytes,
    )
