"""From the arguments of a client's methods to calls and sessions."""

import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from darkroom.v1 import generation_pb2, model_pb2, server_pb2
from darkroom_client._checks import check_seconds, check_text, is_unicode
from darkroom_client._protocol.retries import Call, NextCall
from darkroom_client._protocol.session import GenerationSession
from darkroom_client._protocol.stubs import Stubs
from darkroom_client._protocol.uploads import (
    MAX_REQUEST_BYTES,
    Upload,
    UploadMethod,
    move_to_uploads,
)
from darkroom_client._settings import Metadata, Settings
from darkroom_client._types.adapter import Adapter
from darkroom_client._types.enums import ImageFormat
from darkroom_client._types.events import Accepted
from darkroom_client._types.inputs import ImageSource
from darkroom_client._types.job import Job
from darkroom_client._types.model import Model
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.request import GenerationRequest
from darkroom_client._types.result import GenerationResult
from darkroom_client._types.status import Estimate, ServerStatus
from darkroom_client._wire.adapters import decode_adapter
from darkroom_client._wire.events import decode_accepted
from darkroom_client._wire.inputs import with_images
from darkroom_client._wire.jobs import JobPage, decode_job, decode_page
from darkroom_client._wire.models import decode_model
from darkroom_client._wire.requests import encode_preview, encode_request
from darkroom_client._wire.results import decode_response
from darkroom_client._wire.status import decode_estimate, decode_status

A = TypeVar("A")

_SEED_BOUND = 2**63


class Calls:
    """Prepares the calls of a client with ``settings``.

    It fixes the seed and the id of a request before the first try. So each further try joins the
    first, or generates the same image. All methods raise ``InvalidRequest``, ``TypeError`` and
    ``ValueError`` for arguments that cannot be sent.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keep = settings.retry.enabled

    def generate(
        self, request: GenerationRequest, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[GenerationResult]:
        """Generate images, and answer when all are done."""
        message = encode_request(_with_id_and_seed(request), keep=self._keep)
        uploads = move_to_uploads(message) if message.ByteSize() > MAX_REQUEST_BYTES else ()
        return self._call(
            "Generate",
            lambda stubs: stubs.health_checked_generation.Generate,
            message,
            decode_response,
            timeout,
            metadata,
            request_id=message.request_id,
            survives_disconnect=self._keep,
            fallback_method=lambda stubs: stubs.generation.Generate,
            uploads=uploads,
        )

    def stream(
        self,
        request: GenerationRequest,
        preview_every: int,
        preview_format: ImageFormat | str,
        timeout: float | None,
        metadata: Mapping[str, str] | None,
    ) -> GenerationSession:
        """Generate images, with events."""
        message = encode_request(_with_id_and_seed(request), keep=self._keep)
        uploads = move_to_uploads(message) if message.ByteSize() > MAX_REQUEST_BYTES else ()
        return GenerationSession(
            message.request_id,
            request=message,
            preview=encode_preview(preview_every, preview_format),
            uploads=uploads,
            address=self._settings.target,
            timeout=self._settings.deadline(timeout),
            metadata=self._settings.metadata(metadata),
            retry=self._settings.retry,
        )

    def watch(
        self, request_id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> GenerationSession:
        """Follow a job that exists."""
        _check_name("request_id", request_id)
        return GenerationSession(
            request_id,
            address=self._settings.target,
            timeout=self._settings.deadline(timeout),
            metadata=self._settings.metadata(metadata),
            retry=self._settings.retry,
        )

    def submit(
        self,
        request: GenerationRequest,
        time_limit: float | None,
        timeout: float | None,
        metadata: Mapping[str, str] | None,
    ) -> Call[Accepted]:
        """Start a job without waiting for it."""
        generation = encode_request(_with_id_and_seed(request))
        uploads = move_to_uploads(generation)
        message = generation_pb2.SubmitGenerationRequest(generation=generation)
        limited = check_seconds("time_limit", time_limit)
        if limited is not None:
            limit = Duration()
            limit.FromNanoseconds(round(limited * 1e9))
            message.time_limit.CopyFrom(limit)
        return self._call(
            "SubmitGeneration",
            lambda stubs: stubs.health_checked_generation.SubmitGeneration,
            message,
            lambda response: decode_accepted(response.accepted),
            timeout,
            metadata,
            request_id=generation.request_id,
            fallback_method=lambda stubs: stubs.generation.SubmitGeneration,
            uploads=uploads,
        )

    def cancel(
        self, request_id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[bool]:
        """Cancel a job."""
        _check_name("request_id", request_id)
        return self._call(
            "CancelGeneration",
            lambda stubs: stubs.control.CancelGeneration,
            generation_pb2.CancelGenerationRequest(request_id=request_id),
            lambda response: bool(response.cancelled),
            timeout,
            metadata,
            request_id=request_id,
        )

    def job(
        self, request_id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Job]:
        """Get the state of one job."""
        _check_name("request_id", request_id)
        return self._call(
            "GetGeneration",
            lambda stubs: stubs.control.GetGeneration,
            generation_pb2.GetGenerationRequest(request_id=request_id),
            lambda response: decode_job(response.generation),
            timeout,
            metadata,
            request_id=request_id,
        )

    def jobs(
        self, page_token: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[JobPage]:
        """List one page of the caller's jobs."""
        return self._call(
            "ListGenerations",
            lambda stubs: stubs.control.ListGenerations,
            generation_pb2.ListGenerationsRequest(page_token=page_token),
            decode_page,
            timeout,
            metadata,
        )

    def estimate(
        self, request: GenerationRequest, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Estimate]:
        """Estimate a request."""
        generation = encode_request(request)
        uploads = move_to_uploads(generation)
        return self._call(
            "EstimateGeneration",
            lambda stubs: stubs.control.EstimateGeneration,
            generation_pb2.EstimateGenerationRequest(generation=generation),
            decode_estimate,
            timeout,
            metadata,
            uploads=uploads,
        )

    def models(
        self, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[list[Model]]:
        """List the models."""
        return self._call(
            "ListModels",
            lambda stubs: stubs.models.ListModels,
            model_pb2.ListModelsRequest(),
            lambda response: [decode_model(model) for model in response.models],
            timeout,
            metadata,
        )

    def model(
        self, id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Model]:
        """Describe one model."""
        _check_name("id", id)
        return self._call(
            "GetModel",
            lambda stubs: stubs.models.GetModel,
            model_pb2.GetModelRequest(model=id),
            lambda response: decode_model(response.model),
            timeout,
            metadata,
        )

    def load_model(
        self, id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Model]:
        """Bring a model into memory."""
        _check_name("id", id)
        return self._call(
            "LoadModel",
            lambda stubs: stubs.models.LoadModel,
            model_pb2.LoadModelRequest(model=id),
            lambda response: decode_model(response.model),
            timeout,
            metadata,
        )

    def unload_model(
        self, id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[int]:
        """Free the memory of a model."""
        _check_name("id", id)
        return self._call(
            "UnloadModel",
            lambda stubs: stubs.models.UnloadModel,
            model_pb2.UnloadModelRequest(model=id),
            lambda response: int(response.unfinished_jobs),
            timeout,
            metadata,
        )

    def pin_model(
        self, id: str, pinned: bool, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Model]:
        """Say whether a model stays in memory."""
        _check_name("id", id)
        return self._call(
            "PinModel",
            lambda stubs: stubs.models.PinModel,
            model_pb2.PinModelRequest(model=id, pinned=pinned),
            lambda response: decode_model(response.model),
            timeout,
            metadata,
        )

    def adapters(
        self, model: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[list[Adapter]]:
        """List the adapters."""
        _check_name("model", model)
        return self._call(
            "ListAdapters",
            lambda stubs: stubs.models.ListAdapters,
            model_pb2.ListAdaptersRequest(model=model),
            lambda response: [decode_adapter(adapter) for adapter in response.adapters],
            timeout,
            metadata,
        )

    def add_adapter(
        self, id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[Adapter]:
        """Offer an adapter."""
        _check_name("id", id)
        return self._call(
            "AddAdapter",
            lambda stubs: stubs.models.AddAdapter,
            model_pb2.AddAdapterRequest(id=id),
            lambda response: decode_adapter(response.adapter),
            timeout,
            metadata,
        )

    def remove_adapter(
        self, id: str, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[int]:
        """Offer an adapter no more."""
        _check_name("id", id)
        return self._call(
            "RemoveAdapter",
            lambda stubs: stubs.models.RemoveAdapter,
            model_pb2.RemoveAdapterRequest(id=id),
            lambda response: int(response.unfinished_jobs),
            timeout,
            metadata,
        )

    def status(
        self, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Call[ServerStatus]:
        """Get the server's status."""
        return self._call(
            "GetStatus",
            lambda stubs: stubs.server.GetStatus,
            server_pb2.GetStatusRequest(),
            decode_status,
            timeout,
            metadata,
        )

    def _call(
        self,
        name: str,
        method: Callable[[Stubs], Any],
        message: Message,
        decode: Callable[[Any], A],
        timeout: float | None,
        metadata: Mapping[str, str] | None = None,
        *,
        request_id: str | None = None,
        survives_disconnect: bool = False,
        fallback_method: Callable[[Stubs], Any] | None = None,
        uploads: tuple[Upload, ...] = (),
    ) -> Call[A]:
        return Call(
            name=name,
            method=method,
            message=message,
            decode=decode,
            address=self._settings.target,
            timeout=self._settings.deadline(timeout),
            metadata=self._settings.metadata(metadata),
            request_id=request_id,
            survives_disconnect=survives_disconnect,
            fallback_method=fallback_method,
            retry=self._settings.retry,
            # Only job-starting calls have a second method.
            control=fallback_method is None,
            uploads=uploads,
        )


def upload_call(
    upload: Upload, call: NextCall, settings: Settings, metadata: Metadata
) -> Call[str]:
    """Send a file before ``call``, in the time that it has; answers with its upload id."""
    return Call(
        name="UploadImage",
        method=lambda stubs: UploadMethod(stubs.images.UploadImage),
        message=upload,
        decode=lambda response: str(response.upload_id),
        address=settings.target,
        timeout=call.timeout,
        metadata=metadata,
        retry=settings.retry,
        control=True,
    )


def _with_id_and_seed(request: GenerationRequest) -> GenerationRequest:
    """``request`` with its id and seed set, so each retry generates the same image."""
    return replace(
        request,
        request_id=request.request_id or uuid.uuid4().hex,
        seed=secrets.randbelow(_SEED_BOUND) if request.seed is None else request.seed,
    )


def _check_name(name: str, value: str) -> None:
    check_text(name, value)
    if not is_unicode(value):
        raise ValueError(f"{name} is {value!r}, not valid Unicode text")


def replayed(record: ReplayRecord, images: Iterable[ImageSource]) -> GenerationRequest:
    """The request of ``record``, without its id, with those of ``images`` that it names.

    Raises ``ValueError`` for an image that the record does not name.
    """
    request = record.request
    given = list(images)
    if given:
        request = with_images(request, given)
    return replace(request, request_id=None)
