"""The services of a server, over the channels of a client."""

from typing import Any

from grpc_health.v1 import health_pb2_grpc

from darkroom.v1 import generation_pb2_grpc, image_pb2_grpc, model_pb2_grpc, server_pb2_grpc


class Stubs:
    """One stub of each service. Blocking or asyncio channels decide the kind of their calls.

    ``health_checked_generation``: for calls that begin jobs, over the channel that goes only to
    servers whose health says that they accept jobs. ``generation``: for other calls that last as
    long as a job. ``control``, ``images``, ``models``, ``server``, ``health``: for short calls,
    over the control channel.
    """

    def __init__(self, checked: Any, plain: Any, control: Any) -> None:
        self.health_checked_generation: Any = generation_pb2_grpc.GenerationServiceStub(checked)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(plain)
        self.control: Any = generation_pb2_grpc.GenerationServiceStub(control)
        self.images: Any = image_pb2_grpc.ImageServiceStub(control)
        self.models: Any = model_pb2_grpc.ModelServiceStub(control)
        self.server: Any = server_pb2_grpc.ServerServiceStub(control)
        self.health: Any = health_pb2_grpc.HealthStub(control)
