"""How to connect to a server, one small dataclass per concern."""

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """Pings that notice a dead connection, in seconds.

    After ``interval`` seconds of silence during a call the client sends a ping; without an answer
    within ``timeout`` seconds the connection counts as lost. Darkroom's server permits an interval
    of 20 or more, and closes a connection with a shorter one.
    """

    interval: float = 60.0
    timeout: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.interval) and math.isfinite(self.timeout)):
            raise ValueError("Keepalive: interval and timeout must be finite")
        if self.interval <= 0 or self.timeout <= 0:
            raise ValueError("Keepalive: interval and timeout must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Retries while the server answers UNAVAILABLE, within the call's timeout.

    ``attempts``: how often a call is tried; None, the default, means until its timeout, and 1 means
    no retry. A stream whose job was accepted is always retried until its timeout, except with 1.
    The first wait is ``initial_backoff`` seconds (at least 0.01), plus or minus 20 %; each further
    wait is ``multiplier`` times longer, up to ``max_backoff``. A wait that the server sends
    overrides it, and does not end the call: there is always a further try before the timeout.
    Without a timeout, a call fails after 120 seconds without any server. Every try has the same
    seed and request id, so a retry generates the same image.
    """

    attempts: int | None = None
    initial_backoff: float = 0.2
    max_backoff: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise ValueError("Retry: attempts must be at least 1, or None for no limit")
        numbers = (self.initial_backoff, self.max_backoff, self.multiplier)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("Retry: initial_backoff, max_backoff and multiplier must be finite")
        if not 0.01 <= self.initial_backoff <= self.max_backoff or self.multiplier < 1:
            raise ValueError(
                "Retry: 0.01 <= initial_backoff <= max_backoff and multiplier >= 1 must hold"
            )

    @property
    def enabled(self) -> bool:
        """Whether there is more than one try."""
        return self.attempts != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """An encrypted connection; the fields are paths of PEM files.

    ``ca``: the trusted CA certificates; if unset, the roots that come with gRPC. ``cert`` and
    ``key``: the client's certificate and its key, if the server requires one (both or none).
    ``server_name``: the name in the server's certificate, if it differs from the address.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS: cert and key go together; only one of them was given")
