"""Settings of retention and shutdown: results, jobs without a subscriber, the drain."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from darkroom_server.settings.option import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """How long the server keeps results, and jobs without a subscriber."""

    result_ttl: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that the server keeps a job's images after its end.",
            choose="Longer than a caller needs to reconnect with the same `request_id`, or to "
            "fetch a submitted job.",
            metavar="SECONDS",
        ),
    ] = 300.0
    result_bytes: Annotated[
        int,
        Ge(0),
        Setting(
            "Total size of kept results. When full, evict the oldest result of the caller using "
            "the most memory.",
            choose="Bytes per image × images per second × `--result-ttl`, or the memory that the "
            "machine can spare. 0 keeps none.",
            metavar="BYTES",
        ),
    ] = 256 * 1024**2
    reattach_grace: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that a job with `on_disconnect: ON_DISCONNECT_KEEP` runs on after its last "
            "subscriber disconnects.",
            choose="As long as your callers need to reconnect.",
            metavar="SECONDS",
        ),
    ] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """How the server stops."""

    drain_delay: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds between reporting NOT_SERVING to health checks and rejecting new jobs.",
            choose="As long as your load balancer needs to notice.",
            metavar="SECONDS",
        ),
    ] = 0.0
    grace: Annotated[
        float,
        Ge(0),
        Setting(
            "Seconds that accepted jobs have to finish once the drain begins.",
            choose="Longer than your longest request, and shorter than the orchestrator waits "
            "before it kills the process.",
            metavar="SECONDS",
        ),
    ] = 30.0
