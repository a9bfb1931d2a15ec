"""Linear steps that were read, by what decides them."""

import hashlib
from collections import OrderedDict
from typing import Any, Self

import numpy as np
import torch

from darkroom_server.engine.stepping.linear_steps import LinearSteps, read_steps

MOST_TABLES = 128
"""Reading a table takes as long as an image's steps, and it has a few kilobytes."""


class StepTables:
    """The linear steps of one configured scheduler, for the runs that were asked for last.

    All copies of the scheduler share it.
    """

    def __init__(self) -> None:
        self._read: OrderedDict[bytes, LinearSteps | None] = OrderedDict()

    def __deepcopy__(self, _: object) -> Self:
        return self

    def of(self, scheduler: Any, first: int = 0) -> LinearSteps | None:
        """As ``read_steps``; ``scheduler`` is a copy that is at the start of a run."""
        key = _digest(scheduler, first)
        if key not in self._read:
            self._read[key] = read_steps(scheduler, first)
            if len(self._read) > MOST_TABLES:
                self._read.popitem(last=False)
        self._read.move_to_end(key)
        return self._read[key]


def _digest(scheduler: Any, first: int) -> bytes:
    """A digest of where a run starts, and of all numbers that the scheduler has computed."""
    digest = hashlib.blake2b(str(first).encode(), digest_size=16)
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            value = value.cpu().numpy()
        if isinstance(value, np.ndarray):
            digest.update(name.encode() + value.tobytes())
        elif value is None or isinstance(value, bool | int | float | str):
            digest.update(f"{name}={value!r};".encode())
    return digest.digest()
