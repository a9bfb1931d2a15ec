"""What a load costs: that of a real model, from the disk or from the host's memory."""

BYTES = 6_938_081_905
"""The weights of SDXL in float16: denoiser, both text encoders, VAE."""

TO_DEVICE, TO_HOST = 20e9, 2e9
"""Bytes per second from the host's memory to the device, and from disk to the host's memory."""


class LoadCosts:
    """Seconds of loads, which take ``scale`` times those of SDXL, and what all so far took.

    ``loads`` onto the device; ``from_disk``: models that were read, before a load or for it.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.read_seconds = scale * BYTES / TO_HOST
        self.copy_seconds = scale * BYTES / TO_DEVICE
        self.loads = 0
        self.from_disk = 0

    @property
    def bytes_moved(self) -> int:
        """From disk, and to the device."""
        return BYTES * (self.loads + self.from_disk)

    @property
    def seconds(self) -> float:
        """Of all reads and copies; some were at the same time."""
        return self.from_disk * self.read_seconds + self.loads * self.copy_seconds

    def cost(self, *, in_host: bool = False, host_only: bool = False) -> float:
        """Seconds of a load, or of a read that ends in the host's memory."""
        read = 0.0 if in_host else self.read_seconds
        return read + (0.0 if host_only else self.copy_seconds)

    def record(self, *, in_host: bool = False, host_only: bool = False) -> None:
        """Count a load or a read."""
        self.loads += not host_only
        self.from_disk += not in_host
