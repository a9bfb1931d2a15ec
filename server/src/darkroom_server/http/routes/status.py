"""``/health``, ``/ready`` and ``/v1/status``: how the server is."""

import time
from typing import Any

from starlette.responses import Response

from darkroom_server.dispatch import Dispatcher, EngineStatus, ModelStatus, State
from darkroom_server.http.call import Answer, Call
from darkroom_server.http.messages.results import json_bytes


class StatusRoutes:
    """Answers from what the engines reported; never asks them. ``started_at`` in Unix seconds."""

    def __init__(self, dispatcher: Dispatcher, started_at: int) -> None:
        self._dispatcher = dispatcher
        self._started_at = started_at

    async def health(self, call: Call) -> Answer:
        """200 as long as the event loop runs, for liveness probes."""
        return _json({"status": "ok"})

    async def ready(self, call: Call) -> Answer:
        """200 while jobs are accepted and an engine can run them, else 503."""
        state = self._dispatcher.availability.state
        return _json({"state": _name(state)}, 200 if state is State.READY else 503)

    async def status(self, call: Call) -> Answer:
        """Everything at this moment, for operators."""
        now = self._dispatcher.snapshot()
        return _json(
            {
                "state": _name(now.state),
                "uptime_seconds": max(0, int(time.time()) - self._started_at),
                "queued_jobs": now.queued_jobs,
                "max_queued_jobs": now.max_queued_jobs,
                "running_jobs": now.running_jobs,
                "accepted_jobs": now.accepted_jobs,
                "ended_jobs": now.ended_jobs,
                "models": [_model(model) for model in now.models],
                "engines": [_engine(engine) for engine in now.engines],
            }
        )


def _model(model: ModelStatus) -> dict[str, Any]:
    return {
        "id": model.id,
        "ready": model.place.ready,
        "state": model.place.state,
        "queued_jobs": model.queued_jobs,
        "running_jobs": model.running_jobs,
        "max_rows": model.info.limits.max_rows if model.info else 0,
    }


def _engine(engine: EngineStatus) -> dict[str, Any]:
    memory = engine.memory
    return {
        "index": engine.index,
        "device": engine.device,
        "ready": engine.ready,
        "restarts": engine.restarts,
        "jobs": engine.jobs,
        "samples": engine.samples,
        "rows_in_use": engine.rows_in_use,
        "memory_bytes": memory.by_kind if memory else {},
        "host_memory_bytes": memory.host_rss if memory else 0,
    }


def _name(state: State) -> str:
    return state.name.lower()


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json_bytes(body), status, media_type="application/json")
