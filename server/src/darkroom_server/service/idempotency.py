"""Idempotency: the same request id and the same fingerprint mean the same job."""

import hashlib
from dataclasses import replace

from darkroom_server.core.errors import InvalidRequest, Violation
from darkroom_server.service.call_context import REQUEST_ID, RULE
from darkroom_server.service.request import GenerationRequest


def fingerprint(request: GenerationRequest) -> bytes:
    """A digest of everything that decides the images.

    Unset fields equal unset fields only. An image counts by its digest, so an upload equals the
    same bytes in the request. The request id, previews and what happens on a disconnect
    are not part of it.
    """
    images = replace(request, request_id="", keep=False, preview_every=0, preview_format=None)
    return hashlib.sha256(repr(images).encode()).digest()


def check_request_id(request_id: str) -> None:
    """Raise ``InvalidRequest`` if ``request_id`` cannot name a job."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest([Violation("request_id", f"{RULE}, and not empty")])
