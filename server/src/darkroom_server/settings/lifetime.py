"""The settings of how long things are kept: results, jobs without a waiter, and the server."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """How long the server remembers what nobody waits for."""

    result_ttl: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that the images of a job are kept once it has ended.",
            choose="Longer than a caller takes to come back with the same `request_id`, or to "
            "fetch what it submitted.",
            metavar="SECONDS",
        ),
    ] = 300.0
    result_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Bytes that kept images take together; beyond, the oldest of the caller that has most "
            "go first.",
            choose="The bytes of an image, times the images of a second, times `--result-ttl`; or "
            "what the machine can spare. 0 keeps none.",
            metavar="BYTES",
        ),
    ] = 256 * 1024**2
    reattach_grace: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that a job lives without a waiter, where its request says `on_disconnect: "
            "ON_DISCONNECT_KEEP`.",
            choose="As long as your callers take to connect again.",
            metavar="SECONDS",
        ),
    ] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """How the server goes away."""

    drain_delay: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds from telling probes that the server goes away to refusing calls.",
            choose="As long as your load balancer takes to notice.",
            metavar="SECONDS",
        ),
    ] = 0.0
    grace: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that accepted jobs have to finish once the server goes away.",
            choose="Longer than your longest request, and shorter than what the orchestrator waits "
            "before it kills.",
            metavar="SECONDS",
        ),
    ] = 30.0
