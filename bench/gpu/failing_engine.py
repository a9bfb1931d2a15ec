"""The engine's process, which loses its device once: in the first batch after a file appears."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.report.results import ROOT
from darkroom_server.core.events import Event
from darkroom_server.engine import main as engine
from darkroom_server.ipc.channel import Channel

CHILD = ("-P", "-m", "bench.gpu.failing_engine")
"""What Python runs in this process, in place of the engine's own module."""

VARIABLE = "BENCH_GPU_FAIL"
"""The environment variable with the path of the file."""


def environment(file: Path) -> dict[str, str]:
    """The variables of a process that starts this one, which imports this module."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: str(file), "PYTHONPATH": os.pathsep.join(paths)}


def lose_device(device: Any) -> None:
    """Let a kernel on ``device`` fail an assertion, after which every call there fails.

    Raises what torch raises then. A CPU asserts nothing: there it only raises.
    """
    import torch

    if device.type == "cuda":
        past_the_end = torch.ones(1, dtype=torch.long, device=device)
        torch.zeros(1, device=device)[past_the_end]
        torch.cuda.synchronize(device)
        raise ValueError("no assertion failed: this device does not check an index")
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def main() -> None:
    """Run an engine for the parent at the other end of the pipe."""
    file = Path(os.environ[VARIABLE])
    run = engine.run

    def run_and_fail(channel: Channel, emit: Callable[[Event], None]) -> None:
        # Torch may only be imported here.
        from darkroom_server.engine.batching.runner import Runner

        denoise = Runner._denoise

        def denoise_or_fail(self: Runner, samples: Sequence[Any]) -> Sequence[Any]:
            if file.exists():
                file.unlink()
                lose_device(self.models[samples[0].group.model].device)
            return denoise(self, samples)

        with patch.object(Runner, "_denoise", denoise_or_fail):
            run(channel, emit)

    with patch.object(engine, "run", run_and_fail):
        engine.main()


if __name__ == "__main__":
    main()
