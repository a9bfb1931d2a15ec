"""Engines' processes that start in a moment, because they do not import torch."""


def child_with(start_loop: str) -> tuple[str, str]:
    """What Python runs in the engine's process, with another ``start_loop``, and without torch."""
    return (
        "-c",
        f"""
import sys, types
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.backends.fake_model import fake_model
from darkroom_server.core.events import BatchDone, EngineReady
from darkroom_server.engine.main import main
{start_loop}
startup = types.ModuleType("startup")
startup.start_loop = start_loop
sys.modules["darkroom_server.engine.loading.startup"] = startup
main()
""",
    )


FAKE_LOOP = child_with("""
def start_loop(_, emit):
    loop = FakeEngine((fake_model("tiny"),), pass_seconds=0.002, load=False)
    loop.start(emit)
    loop.run = loop.closed.wait
    return loop, EngineReady(loop.models, 0.0)
""")
"""An engine's process with a loop that computes nothing."""
