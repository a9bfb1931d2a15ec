"""The servers of many models that serve the trace beside ours."""

from collections.abc import Mapping

from bench.peers.protocols import Wire
from bench.peers.registry import Peer

PEERS: Mapping[str, Peer] = {
    "ray": Peer(
        name="trace-ray",
        label="(c) Ray Serve, multiplexed",
        module="ray_multiplexed",
        environment="ray",
        wire=Wire.RAY,
        packages=("ray",),
        batches=True,
        package=__package__,
    ),
    "triton": Peer(
        name="trace-triton",
        label="(d) Triton, explicit loads",
        module="triton_explicit",
        environment="triton",
        wire=Wire.TRITON,
        packages=("nvidia-pytriton",),
        batches=True,
        package=__package__,
    ),
}
"""By the name that ``--policies`` takes."""
