"""An engine's process on the make-believe CUDA device: ``fake_cuda_engine.py DESCRIPTOR PARENT``.

When it ends, its log says what the device saw of the model ``tiny``.
"""

from collections import defaultdict
from typing import Any

import structlog
import torch

from darkroom_server.engine import main
from darkroom_server.engine.loop import EngineLoop

from .fake_cuda import FakeDevice, fake_cuda

log = structlog.get_logger(__name__)


class Seen:
    """The operators of each component of a model, and the dtypes of their tensors."""

    def __init__(self, device: FakeDevice) -> None:
        self.operators: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._running: list[str] = []
        device.on_operator = self._note

    def watch(self, name: str, module: Any) -> None:
        """Note the operators that ``module`` runs, under ``name``."""
        module.register_forward_pre_hook(lambda *_: self._running.append(name))
        module.register_forward_hook(lambda *_: self._running.pop() and None)

    def _note(self, operator: str, dtypes: tuple[torch.dtype, ...]) -> None:
        if self._running:
            floats = [str(dtype)[6:] for dtype in dtypes if dtype.is_floating_point]
            self.operators[self._running[-1]][operator].update(floats)


def processors_of(module: Any) -> list[str]:
    """The classes of the attention processors in ``module``."""
    found = (getattr(each, "processor", None) for each in module.modules())
    return [type(each).__name__ for each in found if each is not None]


def run() -> None:
    torch.set_num_threads(1)
    with fake_cuda() as device:
        seen = Seen(device)
        run_loop = EngineLoop.run

        def watched(loop: EngineLoop) -> None:
            model: Any = loop._models["tiny"]
            vae = model.decoder._vae
            parts = {
                "text_encoder": model.prompts._text_encoder,
                "unet": model.unet,
                "vae": vae.decoder,
            }
            seen.operators.clear()
            for name, part in parts.items():
                seen.watch(name, part)
            run_loop(loop)
            weights = [w for part in (*parts.values(), vae) for w in part.parameters()]
            log.info(
                "what the device saw",
                dtypes=sorted({str(weight.dtype) for weight in weights}),
                devices=sorted({str(weight.device) for weight in weights}),
                processors=processors_of(model.unet),
                operators={
                    name: {operator: sorted(dtypes) for operator, dtypes in found.items()}
                    for name, found in seen.operators.items()
                },
            )

        EngineLoop.run = watched  # type: ignore[assignment,method-assign]
        main.main()


if __name__ == "__main__":
    run()
