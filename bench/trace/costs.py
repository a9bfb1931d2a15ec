"""What a load costs: that of a real model, wherever its weights are."""

from collections import OrderedDict

BYTES = 6_938_081_905
"""The weights of SDXL in float16: denoiser, both text encoders, VAE."""

TO_DEVICE, TO_HOST = 20e9, 2e9
"""Bytes per second from the host's memory to the device, and from disk to the host's memory."""


class HostMemory:
    """The models whose weights are in the host's memory: those that were loaded last.

    A model goes there when it is loaded from disk. ``seconds`` and ``bytes_moved`` are those of all
    loads so far.
    """

    def __init__(self, models: int, scale: float = 1.0) -> None:
        self._most = models
        self._scale = scale
        self._held: OrderedDict[str, None] = OrderedDict()
        self.loads = 0
        self.from_disk = 0
        self.seconds = 0.0

    @property
    def bytes_moved(self) -> int:
        """From disk, and to the device."""
        return BYTES * (self.loads + self.from_disk)

    def cost(self, model: str) -> float:
        """Seconds that a load of ``model`` takes now."""
        read = 0.0 if model in self._held else BYTES / TO_HOST
        return self._scale * (read + BYTES / TO_DEVICE)

    def load(self, model: str) -> float:
        """Load ``model``; returns the seconds that it takes."""
        seconds = self.cost(model)
        self.loads += 1
        self.seconds += seconds
        self.from_disk += model not in self._held
        self._held[model] = None
        self._held.move_to_end(model)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return seconds
