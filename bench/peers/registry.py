"""The servers that take part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bench.peers.protocols import Wire
from bench.report.results import ROOT

WORK = ROOT / "bench" / "work"
"""The environments, logs and traces of the peers; not in git."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server: its ``module`` in ``package``, and the environment that runs it.

    ``packages`` are those whose versions the page shows. ``batches``: it waits for further requests
    to fill a batch. ``compiled``: it runs the compiled UNet.
    """

    name: str
    label: str
    module: str
    environment: str
    wire: Wire
    packages: tuple[str, ...]
    batches: bool = False
    compiled: bool = False
    package: str = "bench.peers.servers"

    @property
    def is_darkroom(self) -> bool:
        """Whether it is Darkroom's own server."""
        return self.module == DARKROOM

    @property
    def python(self) -> Path:
        """The Python of its environment."""
        home = ROOT / ".venv" if self.environment == ".venv" else WORK / self.environment
        return home / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether its environment is complete."""
        return (self.python.parents[1] / ".installed").exists()


DARKROOM = "darkroom"
SERIAL = "grpc"
"""The loads are shares of the capacity of this peer."""

EAGER: Mapping[str, Peer] = {
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
"""As users of these servers have them."""

COMPILED_SUFFIX = "-compiled"

COMPILED: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        replace(
            each, name=f"{name}{COMPILED_SUFFIX}", label=f"{each.label}, compiled", compiled=True
        )
        for name, each in EAGER.items()
    )
}
"""The same servers with the UNet that Darkroom compiled."""

DARKROOM_COMPILED = f"{DARKROOM}{COMPILED_SUFFIX}"

PEERS: Mapping[str, Peer] = {**EAGER, **COMPILED}
