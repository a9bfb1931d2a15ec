"""The adapters that callers may name, and where they are in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from darkroom_server.core.adapters import AdapterKind
from darkroom_server.core.model import ModelInfo

AdapterKey = tuple[str, str]
"""The ids of a model and of an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """One adapter; ``models`` are those that it fits.

    ``rank`` is the greatest of its layers, ``bytes`` are those in memory: of the model for which
    they are most. ``resident``: it is in the memory of an engine. ``rejection``: why requests for
    it are rejected, empty if they are not.
    """

    id: str
    kind: AdapterKind
    models: tuple[str, ...]
    rank: int
    bytes: int
    resident: bool
    rejection: str


def adapters_of(
    models: Mapping[str, ModelInfo | None], resident: Iterable[AdapterKey]
) -> list[AdapterStatus]:
    """The adapters that fit ``models``, by id; ``resident`` are those in memory."""
    in_memory = {id for _, id in resident}
    ids = sorted({offer.id for info in models.values() if info for offer in info.adapters})
    found = []
    for id in ids:
        offers = {
            model: offer
            for model, info in models.items()
            if info
            for offer in info.adapters
            if offer.id == id
        }
        rejections = [offer.rejection for offer in offers.values()]
        found.append(
            AdapterStatus(
                id=id,
                kind=next(iter(offers.values())).kind,
                models=tuple(offers),
                rank=max(offer.rank for offer in offers.values()),
                bytes=max(offer.bytes for offer in offers.values()),
                resident=id in in_memory,
                rejection=rejections[0] if all(rejections) else "",
            )
        )
    return found
