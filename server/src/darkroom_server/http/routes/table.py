"""Every route of the HTTP door."""

import time

from starlette.responses import Response

from darkroom_server.dispatch import Dispatcher
from darkroom_server.http.call import Answer, Call
from darkroom_server.http.messages.multipart import MAX_FORM_BYTES
from darkroom_server.http.openapi import DOCUMENT
from darkroom_server.http.routes.images import ImageRoutes
from darkroom_server.http.routes.models import ModelRoutes
from darkroom_server.http.routes.page import PageRoutes
from darkroom_server.http.routes.status import StatusRoutes
from darkroom_server.http.routing import Access, Route
from darkroom_server.http.signed_urls import PATH, SignedUrls
from darkroom_server.service.generation import GenerationService


def routes_of(
    service: GenerationService, dispatcher: Dispatcher, urls: SignedUrls, *, page: bool
) -> list[Route]:
    """The routes of one server; ``page``: serve the page too."""
    started_at = int(time.time())
    images = ImageRoutes(service, dispatcher.availability, urls)
    models = ModelRoutes(dispatcher.availability, dispatcher.models, started_at)
    status = StatusRoutes(dispatcher, started_at)
    routes = [
        Route("POST", "/v1/images/generations", images.generate),
        Route("POST", "/v1/images/edits", images.edit, max_body=MAX_FORM_BYTES),
        Route("POST", "/v1/images/variations", images.vary, max_body=MAX_FORM_BYTES),
        Route("POST", "/v1/images/estimate", images.estimate),
        Route("GET", PATH, images.result, Access.OPEN),
        Route("GET", "/v1/models", models.list),
        Route("GET", "/v1/models/{model}", models.get),
        Route("GET", "/v1/status", status.status, Access.ADMIN),
        Route("GET", "/health", status.health, Access.OPEN),
        Route("GET", "/ready", status.ready, Access.OPEN),
        Route("GET", "/openapi.json", _openapi, Access.OPEN),
    ]
    if page:
        files = PageRoutes()
        routes += [
            Route("GET", "/", files.index, Access.OPEN),
            Route("GET", "/page/{file}", files.file, Access.OPEN),
        ]
    return routes


async def _openapi(call: Call) -> Answer:
    return Response(DOCUMENT.read_bytes(), media_type="application/json")
