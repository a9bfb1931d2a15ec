"""A typed client of Darkroom, the text-to-image model server.

>>> from darkroom_client import Client
>>> with Client("127.0.0.1:50051") as client:  # doctest: +SKIP
...     result = client.generate("a large yellow star on a blue background", steps=20, seed=7)
...     result.images[0].save("star.png")
"""

from darkroom_client._async_client import AsyncClient
from darkroom_client._client import Client
from darkroom_client._connection import TLS, Keepalive, Retry
from darkroom_client._enums import ImageFormat, Scheduler
from darkroom_client._errors import (
    Cancelled,
    DarkroomError,
    DeadlineExceeded,
    GenerationFailed,
    ImageWithheld,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ReplyTooLarge,
    ServerError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownRequest,
    Unsupported,
    Violation,
)
from darkroom_client._image import Image
from darkroom_client._model import (
    Model,
    ModelDefaults,
    ModelLimits,
    ModelRuntime,
    SchedulerOffer,
)
from darkroom_client._replay import ReplayRecord
from darkroom_client._request import GenerationRequest
from darkroom_client._result import GenerationResult, Timings

__all__ = [
    "TLS",
    "AsyncClient",
    "Cancelled",
    "Client",
    "DarkroomError",
    "DeadlineExceeded",
    "GenerationFailed",
    "GenerationRequest",
    "GenerationResult",
    "Image",
    "ImageFormat",
    "ImageWithheld",
    "InvalidRequest",
    "Keepalive",
    "Model",
    "ModelDefaults",
    "ModelLimits",
    "ModelNotFound",
    "ModelRuntime",
    "Overloaded",
    "PermissionDenied",
    "QuotaExceeded",
    "ReplayRecord",
    "ReplyTooLarge",
    "Retry",
    "Scheduler",
    "SchedulerOffer",
    "ServerError",
    "Timings",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownRequest",
    "Unsupported",
    "Violation",
]
