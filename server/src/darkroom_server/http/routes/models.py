"""``/v1/models``: which models the server holds, and what they take."""

from dataclasses import asdict
from typing import Any

from starlette.responses import Response

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.model import OPTIONAL_FIELDS, ModelInfo
from darkroom_server.dispatch import Availability, ModelCatalog
from darkroom_server.http.call import Answer, Call
from darkroom_server.http.messages.results import json_bytes

OWNER = "darkroom"


class ModelRoutes:
    """Answers from what the engines reported; ``started_at`` is in Unix seconds."""

    def __init__(self, availability: Availability, catalog: ModelCatalog, started_at: int) -> None:
        self._availability = availability
        self._catalog = catalog
        self._started_at = started_at

    async def list(self, call: Call) -> Answer:
        """Every model, in the configured order."""
        await self._catalog.look_at_files()
        models = self._availability.models
        data = [self._model(id, info) for id, info in models.items()]
        return _json({"object": "list", "data": data})

    async def get(self, call: Call) -> Answer:
        """One model; raises ``UnknownModel``."""
        await self._catalog.look_at_files()
        id = self._availability.resolve(call.path["model"])
        return _json(self._model(id, self._availability.models[id]))

    def _model(self, id: str, info: ModelInfo | None) -> dict[str, Any]:
        model = {"id": id, "object": "model", "created": self._started_at, "owned_by": OWNER}
        ready = self._catalog.status(id).ready
        if info is None:
            return {**model, "ready": ready}
        return {
            **model,
            "ready": ready,
            "revision": info.revision,
            "kind": info.kind,
            "defaults": asdict(info.defaults),
            "limits": asdict(info.limits),
            "schedulers": [
                {
                    "name": offer.name,
                    "min_steps": offer.min_steps,
                    "max_steps": offer.max_steps,
                }
                for offer in info.schedulers
            ],
            "optional_fields": [name for name in OPTIONAL_FIELDS if name in info.optional_fields],
            "tasks": list(info.tasks),
            "loras": [
                offer.id
                for offer in info.adapters
                if offer.kind is AdapterKind.LORA and not offer.rejection
            ],
            "guidance": asdict(info.guidance),
            **({"runtime": asdict(info.runtime)} if ready else {}),
        }


def _json(body: dict[str, Any]) -> Response:
    return Response(json_bytes(body), media_type="application/json")
