"""The adapters of the fake server."""

from collections.abc import Iterable

from darkroom.v1 import generation_pb2
from darkroom_client._errors import AdapterNotFound, AdapterUnusable, Violation
from darkroom_client._types.adapter import Adapter, AdapterKind
from darkroom_client._types.model import Model
from darkroom_client.testing._validation import invalid


class Adapters:
    """Those on offer, and those that can be added; one that was removed can be added again."""

    def __init__(self, offered: Iterable[Adapter] = (), addable: Iterable[Adapter] = ()) -> None:
        self._offered = {adapter.id: adapter for adapter in offered}
        self._addable = {adapter.id: adapter for adapter in addable}

    @property
    def offered(self) -> list[Adapter]:
        """Those that requests may name, by id."""
        return [self._offered[id] for id in sorted(self._offered)]

    def check(self, request: generation_pb2.GenerateRequest, model: Model) -> None:
        """Raise ``AdapterNotFound``, or ``InvalidRequest`` for one that ``model`` does not take."""
        violations = []
        asked = [(f"loras[{i}].id", AdapterKind.LORA, x.id) for i, x in enumerate(request.loras)]
        asked += [
            (f"controls[{i}].id", AdapterKind.CONTROLNET, x.id)
            for i, x in enumerate(request.controls)
        ]
        for field, kind, id in asked:
            adapter = self._find(id, kind)
            reason = adapter.rejection
            if model.id not in adapter.models:
                reason = f"does not fit model {model.id!r}"
            if reason:
                violations.append(Violation(field=field, description=f"{id!r}: {reason}"))
        if violations:
            raise invalid(*violations)

    def add(self, id: str, jobs: int) -> Adapter:
        """Offer an adapter, which ``jobs`` unfinished jobs use; raises as a Darkroom server does.

        One that is on offer is returned as it is.
        """
        if id in self._offered:
            return self._find(id)
        if id not in self._addable:
            others = ", ".join(sorted(self._addable)) or "none"
            raise AdapterNotFound(
                f"no adapter {id!r}; besides what it offers, the server has {others}"
            )
        adapter = self._addable[id]
        if jobs:
            raise AdapterUnusable(
                f"unfinished jobs still use the adapter {id!r} that was removed ({jobs})"
            )
        if adapter.rejection:
            raise AdapterUnusable(f"adapter {id!r} cannot be offered: {adapter.rejection}")
        self._offered[id] = self._addable.pop(id)
        return adapter

    def remove(self, id: str) -> None:
        """Offer an adapter no more; raises ``AdapterNotFound``."""
        self._find(id)
        self._addable[id] = self._offered.pop(id)

    def _find(self, id: str, kind: AdapterKind = AdapterKind.LORA) -> Adapter:
        known = {adapter.id: adapter for adapter in self.offered if adapter.kind is kind}
        if id not in known:
            names = ", ".join(known) or "none"
            raise AdapterNotFound(f"no adapter {id!r}; this server has {names}")
        return known[id]
