"""The servers that take part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.protocols import Wire
from bench.report.results import ROOT

WORK = ROOT / "bench" / "work"
"""The environments, logs and traces of the peers; not in git."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server: its ``module`` in ``bench.peers.servers``, and the environment that runs it.

    ``packages`` are those whose versions the page shows. ``batches``: it waits for further requests
    to fill a batch.
    """

    name: str
    label: str
    module: str
    environment: str
    wire: Wire
    packages: tuple[str, ...]
    batches: bool = False

    @property
    def python(self) -> Path:
        """The Python of its environment."""
        home = ROOT / ".venv" if self.environment == ".venv" else WORK / self.environment
        return home / "bin" / "python"


DARKROOM = "darkroom"
SERIAL = "grpc"
"""The loads are shares of the capacity of this peer."""

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(SERIAL, "(a) gRPC and a lock", "grpc_lock", "grpc", Wire.GRPC, ("grpcio",)),
        Peer(
            *("litserve", "(b) LitServe", "litserve_batch", "litserve", Wire.LITSERVE),
            packages=("litserve",),
            batches=True,
        ),
        Peer("ray", "(c) Ray Serve", "ray_batch", "ray", Wire.RAY, ("ray",), batches=True),
        Peer(
            *("triton", "(d) Triton", "triton_batch", "triton", Wire.TRITON),
            packages=("nvidia-pytriton",),
            batches=True,
        ),
        Peer(DARKROOM, "(e) Darkroom", "darkroom", ".venv", Wire.GRPC, ("darkroom-server",)),
    )
}
