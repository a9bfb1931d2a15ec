"""Who takes part."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.protocols import Wire
from bench.results import ROOT

WORK = ROOT / "bench" / "work"
"""The peers' environments, logs and traces; not in git."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server: its ``module`` of ``bench.peers.servers``, and the environment that runs it.

    ``packages`` are those whose versions a reader asks for. ``batches``: it waits for company.
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
        """The interpreter of its environment."""
        home = ROOT / ".venv" if self.environment == ".venv" else WORK / self.environment
        return home / "bin" / "python"


DARKROOM = "darkroom"
SERIAL = "grpc"
"""Whose capacity the loads are shares of."""

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
