"""Which calls wait for their device; that is the CPU here, and the host is torch's ``meta``."""

from collections.abc import Callable
from typing import Any

import pytest
import structlog
import torch

from darkroom_server.engine.forms.waits import WaitsForDevice, refusing_waits

from .test_graphs import Denoiser, FakeRecorder, graphed

CPU = torch.device("cpu")
THERE = torch.arange(12.0).reshape(3, 4)
MASK = THERE > 4
ELSEWHERE = THERE.to("meta")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "item": (lambda: THERE[0, 0].item(), "item|_local_scalar_dense"),
    "float": (lambda: float(THERE[0, 0]), "item|_local_scalar_dense"),
    "condition": (lambda: bool(MASK.any()), "is_nonzero|item|_local_scalar_dense"),
    "index by a mask": (lambda: THERE[MASK], "index"),
    "masked select": (lambda: THERE.masked_select(MASK), "masked_select"),
    "nonzero": (lambda: THERE.nonzero(), "nonzero"),
    "bincount": (lambda: torch.bincount(torch.tensor([1, 2])), "bincount"),
    "unique": (lambda: THERE.unique(), "_unique2"),
    "equal": (lambda: torch.equal(THERE, THERE), "equal"),
    "copy to the host": (lambda: THERE.to("meta"), "to|_to_copy"),
    "copy of a number": (lambda: THERE[0, 0].to("meta"), "to|_to_copy"),
}

ALLOWED: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (THERE @ THERE.T).softmax(-1).sum(),
    "index by numbers": lambda: THERE[torch.tensor([2, 0])],
    "masks": lambda: torch.where(MASK, THERE, 0.0).masked_fill(MASK, 1.0),
    "another dtype": lambda: THERE.to(torch.float16),
    "copy": lambda: THERE.clone().copy_(THERE),
    "factory": lambda: torch.arange(4, device=CPU) + THERE,
    "on the host": lambda: ELSEWHERE + ELSEWHERE,
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_what_waits_is_refused(what: str, inference: bool) -> None:
    call, operator = REFUSED[what]
    with (
        torch.inference_mode(inference),
        refusing_waits(CPU),
        pytest.raises(WaitsForDevice, match=rf"in ({operator})"),
    ):
        call()


@pytest.mark.parametrize("what", ALLOWED)
def test_what_does_not_wait_runs(what: str) -> None:
    with torch.inference_mode(), refusing_waits(CPU):
        assert isinstance(ALLOWED[what](), torch.Tensor)


class Waiting(Denoiser):
    """As those of diffusers that count the tokens of each expert."""

    def forward(self, sample: Any, timestep: Any, **others: Any) -> tuple[torch.Tensor]:
        if timestep.sum() < 0:
            raise AssertionError
        return super().forward(sample, timestep, **others)


def test_a_denoiser_that_waits_is_never_captured() -> None:
    recorder = FakeRecorder()
    with structlog.testing.capture_logs() as logs:
        _, found = graphed(Waiting(), recorder, (2, 4))
    assert found is None
    assert recorder.recorded == []
    (line,) = logs
    assert line["event"] == "denoiser stays eager"
    assert line["why"].startswith("it waits for the device in ")
