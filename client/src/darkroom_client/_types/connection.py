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

    A call is tried at most ``attempts`` times (1 to 5; 1 means no retry). The first wait is
    ``initial_backoff`` seconds (at least 0.01), plus or minus 20 %; each further wait is
    ``multiplier`` times longer, up to ``max_backoff``. A wait that the server sends overrides it.
    The second try of ``generate`` and ``submit`` is made at once, at any server. If many calls
    fail, retries stop until some succeed. Every try has the same seed and request id, so a retry
    generates the same image.
    """

    attempts: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        # gRPC limits the attempts to 5 without an error.
        if not 1 <= self.attempts <= 5:
            raise ValueError("Retry: attempts must be 1 to 5")
        numbers = (self.initial_backoff, self.max_backoff, self.multiplier)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("Retry: initial_backoff, max_backoff and multiplier must be finite")
        # Below 2 ms, calls hang in gRPC until after their deadline (grpc/grpc#41036).
        if not 0.01 <= self.initial_backoff <= self.max_backoff or self.multiplier < 1:
            raise ValueError(
                "Retry: 0.01 <= initial_backoff <= max_backoff and multiplier >= 1 must hold"
            )


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
