"""A server with the fake engine, of the imported version; `python serve.py [SERVICE]`.

The server lacks ``SERVICE``, as if it were too old to have it. It logs JSON to stdout.
"""

import importlib
import sys

import structlog

import darkroom_server
from darkroom.v1 import server_pb2_grpc
from darkroom_server.app import run
from darkroom_server.settings import Network, Settings

PASS_SECONDS = 0.01


def fake_engine() -> type:
    """The class of the fake engine, which is in another module in 0.1.0."""
    try:
        module = importlib.import_module("darkroom_server.backends.fake")
    except ModuleNotFoundError:
        module = importlib.import_module("darkroom_server.engine.fake")
    engine: type = module.FakeEngine
    return engine


if __name__ == "__main__":
    for service in sys.argv[1:]:
        setattr(server_pb2_grpc, f"add_{service}Servicer_to_server", lambda *_: None)
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    structlog.get_logger().info("imported", path=darkroom_server.__file__)
    settings = Settings(network=Network(port=0, metrics_port=0))
    run(settings, [fake_engine()(pass_seconds=PASS_SECONDS)])
