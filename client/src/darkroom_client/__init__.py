"""A typed client of Darkroom, the text-to-image model server.

>>> from darkroom_client import Client
>>> with Client("127.0.0.1:50051") as client:  # doctest: +SKIP
...     result = client.generate("a large yellow star on a blue background", steps=20, seed=7)
...     result.images[0].save("star.png")
"""

from darkroom_client._async_client import AsyncClient
from darkroom_client._async_stream import AsyncStream
from darkroom_client._canny import canny
from darkroom_client._client import Client
from darkroom_client._errors import (
    AdapterNotFound,
    AdapterUnusable,
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    DeadlineUnreachable,
    GenerationFailed,
    ImageWithheld,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    ModelUnusable,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ReplyTooLarge,
    ServerError,
    TLSError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownRequest,
    Unsupported,
    UploadNotFound,
    Violation,
)
from darkroom_client._stream import Stream
from darkroom_client._types.adapter import Adapter, AdapterKind
from darkroom_client._types.connection import TLS, Keepalive, Retry
from darkroom_client._types.enums import ImageFormat, PromptSyntax, Scheduler
from darkroom_client._types.events import (
    Accepted,
    Event,
    Finished,
    FinishReason,
    ImageReady,
    Preview,
    Progress,
    Queued,
    Reconnecting,
    Restarted,
    Started,
)
from darkroom_client._types.image import Image
from darkroom_client._types.inputs import Control, ImageSource, UploadedImage
from darkroom_client._types.job import Job, JobState
from darkroom_client._types.model import (
    Guidance,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelLoad,
    ModelRuntime,
    ModelState,
    RowLimitSource,
    SchedulerOffer,
    Task,
)
from darkroom_client._types.replay import ReplayRecord
from darkroom_client._types.request import GenerationOptions, GenerationRequest
from darkroom_client._types.result import GenerationResult, Timings
from darkroom_client._types.status import (
    EngineStatus,
    Estimate,
    ModelStatus,
    PassTime,
    ServerState,
    ServerStatus,
)

__all__ = [
    "TLS",
    "Accepted",
    "Adapter",
    "AdapterKind",
    "AdapterNotFound",
    "AdapterUnusable",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "Control",
    "DarkroomError",
    "DeadlineExceeded",
    "DeadlineUnreachable",
    "EngineStatus",
    "Estimate",
    "Event",
    "FinishReason",
    "Finished",
    "GenerationFailed",
    "GenerationOptions",
    "GenerationRequest",
    "GenerationResult",
    "Guidance",
    "Image",
    "ImageFormat",
    "ImageReady",
    "ImageSource",
    "ImageWithheld",
    "InvalidRequest",
    "Job",
    "JobState",
    "Keepalive",
    "Model",
    "ModelDefaults",
    "ModelDoesNotFit",
    "ModelLimits",
    "ModelLoad",
    "ModelNotFound",
    "ModelRuntime",
    "ModelState",
    "ModelStatus",
    "ModelUnusable",
    "Overloaded",
    "PassTime",
    "PermissionDenied",
    "Preview",
    "Progress",
    "PromptSyntax",
    "Queued",
    "QuotaExceeded",
    "Reconnecting",
    "ReplayRecord",
    "ReplyTooLarge",
    "Restarted",
    "Retry",
    "RowLimitSource",
    "Scheduler",
    "SchedulerOffer",
    "ServerError",
    "ServerState",
    "ServerStatus",
    "Started",
    "Stream",
    "TLSError",
    "Task",
    "Timings",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownRequest",
    "Unsupported",
    "UploadNotFound",
    "UploadedImage",
    "Violation",
    "canny",
]
