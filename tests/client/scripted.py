"""A server on a free port whose answers a test scripts."""

import hashlib
import io
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from types import TracebackType
from typing import Any, Self

import grpc
import PIL.Image
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from darkroom.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    types_pb2,
)

Answer = generation_pb2.GenerateResponse
Behaviour = Callable[[generation_pb2.GenerateRequest, grpc.ServicerContext], Answer]

SERVICE = "darkroom.v1.GenerationService"
SIZE = 16


def respond(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Answer:
    """The answer of a working server: squares with a colour of the seed."""
    count = request.image_count if request.HasField("image_count") else 1
    seed = request.seed if request.HasField("seed") else 4711
    return generation_pb2.GenerateResponse(
        request_id=request.request_id or "named-by-server",
        images=[_image(request, seed + index) for index in range(count)],
        timings=generation_pb2.Timings(
            queue=Duration(nanos=1_000_000),
            encode_prompt=Duration(nanos=2_000_000),
            denoise=Duration(seconds=1, nanos=500_000_000),
            decode=Duration(nanos=4_000_000),
            encode_image=Duration(nanos=5_000_000),
            total=Duration(seconds=1, nanos=600_000_000),
        ),
        model=request.model or "demo",
        model_revision="r1",
    )


def fail(
    code: grpc.StatusCode,
    reason: str = "",
    message: str = "no",
    details: Sequence[Message] = (),
    metadata: dict[str, str] | None = None,
) -> Behaviour:
    """An error as Darkroom's server sends it; without ``reason``, as gRPC sends it."""

    def behave(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Answer:
        if not reason and not details:
            context.abort(code, message)
        info = [ErrorInfo(reason=reason, domain="darkroom", metadata=metadata)] if reason else []
        packed = [PackedAny() for _ in (*info, *details)]
        for box, detail in zip(packed, (*info, *details), strict=True):
            box.Pack(detail)
        number: int = code.value[0]
        status = Status(code=number, message=message, details=packed)
        context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort raises")

    return behave


def held(released: threading.Event) -> Behaviour:
    """An answer that waits until ``released`` is set."""

    def behave(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Answer:
        assert released.wait(60)
        return respond(request, context)

    return behave


def changed(**fields: Any) -> Behaviour:
    """An answer with changed fields of its image."""

    def behave(request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Answer:
        answer = respond(request, context)
        for image in answer.images:
            for name, value in fields.items():
                setattr(image, name, value)
        return answer

    return behave


class ScriptedServer(
    generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer
):
    """Answers each ``Generate`` with the next behaviour of ``script``, or with ``respond``.

    ``requests``, ``metadata`` and ``peers`` record every try that arrived.
    """

    def __init__(
        self,
        ready: bool = True,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.script: deque[Behaviour] = deque()
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.peers: set[str] = set()
        self.models = [demo_model()]
        self._pool = futures.ThreadPoolExecutor(8)
        self.refuse_health = False
        self._watchers = futures.ThreadPoolExecutor(2)
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=self._watchers
        )
        self.ready = ready
        self._server = grpc.server(
            self._pool, interceptors=[_Gate(self)], options=(("grpc.so_reuseport", 0),)
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{port}"

    @property
    def ready(self) -> bool:
        """The answer of health checks."""
        return self._ready

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._ready = ready
        status = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if ready else "NOT_SERVING"
        )
        for service in ("", SERVICE):
            self._health.set(service, status)

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> generation_pb2.GenerateResponse:
        self._note(context)
        self.requests.append(request)
        behave = self.script.popleft() if self.script else respond
        return behave(request, context)

    def _unscripted(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in the script")

    GenerateStream = SubmitGeneration = WatchGeneration = _unscripted
    CancelGeneration = EstimateGeneration = _unscripted
    GetGeneration = ListGenerations = ListAdapters = AddAdapter = RemoveAdapter = _unscripted
    LoadModel = UnloadModel = PinModel = _unscripted

    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Any
    ) -> model_pb2.ListModelsResponse:
        self._note(context)
        return model_pb2.ListModelsResponse(models=self.models)

    def GetModel(
        self, request: model_pb2.GetModelRequest, context: Any
    ) -> model_pb2.GetModelResponse:
        self._note(context)
        for model in self.models:
            if request.model in ("", model.id):
                return model_pb2.GetModelResponse(model=model)
        fail(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", f"no model {request.model!r}")(
            generation_pb2.GenerateRequest(), context
        )
        raise AssertionError("abort raises")

    def _note(self, context: grpc.ServicerContext) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.add(context.peer())

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()
        self._watchers.shutdown()


class _Gate(grpc.ServerInterceptor):
    """Rejects health checks if the test wants that."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if self._server.refuse_health and "Health" in details.method:

            def refuse(request: bytes, context: grpc.ServicerContext) -> None:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

            return grpc.unary_stream_rpc_method_handler(refuse)
        return continuation(details)


def demo_model() -> model_pb2.Model:
    """The description of a loaded model."""
    return model_pb2.Model(
        id="demo",
        revision="r1",
        kind="StableDiffusionPipeline",
        ready=True,
        defaults=model_pb2.ModelDefaults(
            width=64,
            height=64,
            steps=20,
            guidance_scale=7.1,
            scheduler=types_pb2.SCHEDULER_EULER,
            format=types_pb2.IMAGE_FORMAT_PNG,
            quality=90,
        ),
        limits=model_pb2.ModelLimits(
            min_size=16,
            max_size=128,
            size_multiple=8,
            max_guidance_scale=50,
            max_image_count=16,
            max_prompt_bytes=8192,
            prompt_tokens=77,
            max_rows=8,
        ),
        schedulers=[
            model_pb2.SchedulerOffer(
                scheduler=types_pb2.SCHEDULER_EULER, min_steps=1, max_steps=1000
            )
        ],
        runtime=model_pb2.ModelRuntime(
            device="cpu", dtype="float32", preset="fast", attention="sdpa"
        ),
    )


def _image(request: generation_pb2.GenerateRequest, seed: int) -> generation_pb2.Image:
    pixels = bytes([seed % 256, 0, 255 - seed % 256]) * SIZE * SIZE
    image_format = request.format or types_pb2.IMAGE_FORMAT_PNG
    alone = generation_pb2.GenerateRequest()
    alone.CopyFrom(request)
    alone.seed, alone.image_count, alone.format = seed, 1, image_format
    alone.guidance_scale = 7.1
    alone.scheduler = request.scheduler or types_pb2.SCHEDULER_EULER
    return generation_pb2.Image(
        data=_encode(pixels, image_format),
        format=image_format,
        width=SIZE,
        height=SIZE,
        seed=seed,
        replay=generation_pb2.ReplayRecord(
            request=alone,
            model_revision="r1",
            scheduler_class="EulerDiscreteScheduler",
            scheduler_config_json=json.dumps({"beta_start": 0.00085, "steps_offset": 1}),
            dtype="float32",
            device="cpu",
            preset="fast",
            library_versions={"torch": "2.13.0", "diffusers": "0.42.1"},
            rows_in_last_pass=2,
            pixels_sha256=hashlib.sha256(pixels).hexdigest(),
        ),
    )


def _encode(pixels: bytes, image_format: int) -> bytes:
    name = types_pb2.ImageFormat.Name(types_pb2.ImageFormat.ValueType(image_format))
    name = name.removeprefix("IMAGE_FORMAT_")
    if name == "RAW_RGB":
        return pixels
    buffer = io.BytesIO()
    PIL.Image.frombytes("RGB", (SIZE, SIZE), pixels).save(buffer, name)
    return buffer.getvalue()
