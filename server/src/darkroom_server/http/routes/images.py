"""``/v1/images``: generate, estimate, and results by their signed URLs."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace

from starlette.responses import Response

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import DarkroomError, InvalidRequest, UnknownRequest, Violation
from darkroom_server.core.model import ModelInfo
from darkroom_server.dispatch import ActiveJob, Availability
from darkroom_server.http.body import json_object
from darkroom_server.http.call import Answer, Call, Stream
from darkroom_server.http.messages.event_stream import event_stream
from darkroom_server.http.messages.fields import FORM_FIELDS
from darkroom_server.http.messages.multipart import Form, form_of
from darkroom_server.http.messages.request import (
    ImageRequest,
    edit_images,
    image_request,
    renamed,
)
from darkroom_server.http.messages.results import ResultWriter, json_bytes
from darkroom_server.http.signed_urls import EXTENSIONS, SignedUrls
from darkroom_server.service.generation import GenerationService
from darkroom_server.service.summary import RequestSummary
from darkroom_server.service.validation import MAX_REPLY_BYTES, ReplyLimit

CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "rgb": "application/octet-stream",
}

NO_PROMPT = " "
"""Of a variation without one: an empty prompt would be invalid."""

EDIT_EVENTS = "image_edit"

REPLY_LIMIT = ReplyLimit(MAX_REPLY_BYTES, "response_format: url")


class ImageRoutes:
    """Converts calls for ``GenerationService``; every method raises ``DarkroomError``."""

    def __init__(
        self, service: GenerationService, availability: Availability, urls: SignedUrls
    ) -> None:
        self._service = service
        self._availability = availability
        self._urls = urls

    async def generate(self, call: Call) -> Answer:
        """Generate images: one answer, or a stream of events."""
        body = json_object(call.headers, call.body)
        model = await self._model(body.get("model"))
        by_default = self._urls.by_default
        request = image_request(body, call.key, model, urls_by_default=by_default)
        return await self._answer(call, await self._checked(call, request))

    async def edit(self, call: Call) -> Answer:
        """Change the pictures of a form as its prompt says, all of them or where a mask says."""
        form = await form_of(call.headers, call.body, FORM_FIELDS)
        model = await self._model(form.values.get("model"))
        images = edit_images(form, model)
        request = image_request(
            form.values,
            call.key,
            model,
            FORM_FIELDS,
            images,
            EDIT_EVENTS,
            urls_by_default=self._urls.by_default,
        )
        return await self._answer(call, await self._checked(call, _with_image(request, form)))

    async def vary(self, call: Call) -> Answer:
        """Make variations of the picture of a form; a prompt is not needed."""
        form = await form_of(call.headers, call.body, FORM_FIELDS)
        values = {"prompt": NO_PROMPT, **form.values}
        images = edit_images(Form(values={}, images=form.images, mask=form.mask), None)
        model = await self._model(values.get("model"))
        request = image_request(
            values,
            call.key,
            model,
            FORM_FIELDS,
            images,
            EDIT_EVENTS,
            urls_by_default=self._urls.by_default,
        )
        return await self._answer(call, await self._checked(call, _with_image(request, form)))

    async def _answer(self, call: Call, request: ImageRequest) -> Answer:
        if request.stream:
            events = self._stream(call, request)
            await anext(events)  # An error before the job is accepted is a status, not an event.
            return Stream(events)
        with self._service.summaries.record(
            request.generation, call.context, call.arrived, call.deadline
        ) as summary:
            writer, active, _ = await self._accept(call, request, summary)
            with active.subscribe():
                finished = await active.result()
            summary.finished(finished)
            total = time.monotonic() - call.arrived
            body = await writer.response(finished.images, finished.stages, total)
        return Response(body, media_type="application/json")

    async def estimate(self, call: Call) -> Answer:
        """What a request would take now, without running it."""
        body = json_object(call.headers, call.body)
        request = image_request(body, call.key, await self._model(body.get("model")))
        request = await self._checked(call, request)
        try:
            estimate = await self._service.estimate(request.generation, call.context)
        except InvalidRequest as error:
            raise self._renamed(error, request) from None
        known = estimate.time
        body = {
            "queue_wait_seconds": known.queue_wait if known else None,
            "run_seconds": known.run_time if known else None,
            "peak_bytes": estimate.peak_bytes,
            "available_bytes": estimate.available_bytes,
        }
        return Response(json_bytes(body), media_type="application/json")

    async def result(self, call: Call) -> Answer:
        """One image of a job that ended, by its signed URL."""
        name, request_id, index = self._urls.check(call.path, call.query)
        context = replace(call.context, caller=Caller(name=name))
        active = await self._service.find(context, request_id)
        image = active.images.get(index)
        if image is None and active.entry is not None and not active.ended:
            # It is generated again, after a restart of the server.
            with active.subscribe():
                await active.result()
            image = active.images.get(index)
        if image is None or not (data := image.data):
            raise UnknownRequest(request_id)
        headers = {
            "cache-control": f"private, max-age={int(self._urls.seconds)}",
            "content-security-policy": "default-src 'none'; sandbox",
            "cross-origin-resource-policy": "cross-origin",
        }
        return Response(data, media_type=CONTENT_TYPES[EXTENSIONS[image.format]], headers=headers)

    async def _stream(self, call: Call, request: ImageRequest) -> AsyncGenerator[bytes]:
        """The events of one request; the first is empty, and means that the job is accepted."""
        with self._service.summaries.record(
            request.generation, call.context, call.arrived, call.deadline
        ) as summary:
            writer, active, joined = await self._accept(call, request, summary)
            with active.subscribe(images_only=not request.progress) as subscription:
                del active  # A subscription releases the job of a stalled reader.
                events = event_stream(writer, subscription, summary, joined=joined)
                yield b""
                async with aclosing(events):
                    async for event in events:
                        yield event

    async def _accept(
        self, call: Call, request: ImageRequest, summary: RequestSummary
    ) -> tuple[ResultWriter, ActiveJob, bool]:
        """The job of ``request``, how its images are written, and whether it was joined."""
        context = call.context
        call.ending.callback(self._service.open_call(context, context.request_id))
        try:
            active, joined = await self._service.accept(
                request.generation,
                context,
                summary,
                deadline=call.deadline,
                # A result can be fetched by its URL only if it is kept under an id.
                idempotent=bool(call.key) or request.stream or request.as_urls,
                reply_limit=None if request.stream or request.as_urls else REPLY_LIMIT,
            )
        except InvalidRequest as error:
            raise self._renamed(error, request) from None
        writer = ResultWriter(
            request=request,
            job=active.job,
            model=active.model,
            caller=context.caller.name,
            request_id=context.request_id,
            base_url=call.base_url,
            urls=self._urls,
        )
        return writer, active, joined

    async def _checked(self, call: Call, request: ImageRequest) -> ImageRequest:
        """``request``; raises ``InvalidRequest`` with all violations if it has any."""
        wrong = [*call.violations, *request.violations]
        if request.as_urls and not self._urls.seconds:
            wrong.append(Violation("response_format", "this server keeps no results: url is off"))
        if wrong:
            raise InvalidRequest(wrong + await self._more_violations(call, request))
        return request

    async def _model(self, asked: object) -> ModelInfo | None:
        """The model that a body names, None if there is none."""
        with suppress(DarkroomError):
            id = await self._service.resolve(asked if isinstance(asked, str) else "")
            return self._availability.models[id]
        return None

    async def _more_violations(self, call: Call, request: ImageRequest) -> list[Violation]:
        """What the service layer would find wrong with the valid fields of an invalid request."""
        known = {each.field for each in request.violations}
        try:
            await self._service.estimate(request.generation, call.context)
        except InvalidRequest as error:
            found = self._renamed(error, request).violations
            return [each for each in found if each.field not in known]
        except DarkroomError:
            pass  # Not about the fields, and the caller meets it once they are valid.
        return []

    def _renamed(self, error: InvalidRequest, request: ImageRequest) -> InvalidRequest:
        return renamed(error, sized=request.sized)


def _with_image(request: ImageRequest, form: Form) -> ImageRequest:
    """``request``, with a violation if its form has no picture."""
    if form.images:
        return request
    wrong = Violation("image", "must be a file: a PNG, JPEG or WebP")
    return replace(request, violations=(*request.violations, wrong))
