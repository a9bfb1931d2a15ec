"""Steps of gradient descent over few weights, with a rate that rises, then falls to zero."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.rates import rate_at

_RAMP = 20


class Descent:
    """Iterates over `steps` batches, numbered from 1; the loop calls `step` with each one's loss.

    Prints the mean loss after every 25 batches, after `name`.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], steps: int, peak_rate: float
    ) -> None:
        self.minutes = 0.0
        """How long the steps took."""
        self._name = name
        self._parameters = parameters
        self._steps = steps
        self._peak_rate = peak_rate
        self._optimizer = torch.optim.AdamW(
            parameters, lr=peak_rate, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
        )
        self._losses: list[float] = []

    def __iter__(self) -> Iterator[int]:
        started = time.monotonic()
        for number in range(1, self._steps + 1):
            for group in self._optimizer.param_groups:
                group["lr"] = self._peak_rate * rate_at(number, number / self._steps, _RAMP)
            yield number
            self.minutes = (time.monotonic() - started) / 60
            if number % 25 == 0:
                mean = sum(self._losses[-25:]) / 25
                rate = 60 * self.minutes / number
                print(
                    f"{self._name} {number}/{self._steps} loss {mean:.4f} {rate:.3f} s/step",
                    flush=True,
                )

    def step(self, loss: Tensor) -> None:
        """Change the weights along the gradient of `loss`."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._losses.append(loss.item())
