"""How to reach a server, one small dataclass per concern."""

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """Pings that notice a dead connection, in seconds.

    After ``interval`` of silence during a call a ping goes out; without an answer within
    ``timeout`` the connection counts as lost. Darkroom's server permits an interval of 20 and
    more; a shorter one gets the connection closed.
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
    """Trying again while the server answers UNAVAILABLE, within the call's timeout.

    A call is tried at most ``attempts`` times (1 to 5; 1 means no retry). The wait between two
    tries is ``initial_backoff`` seconds (0.01 and more) at first, give or take a fifth, and grows
    by ``multiplier`` up to ``max_backoff``; a wait that the server names goes before it. The
    second try of ``generate`` and ``submit`` is made at once, at any server. When many
    calls fail, retries stop until some succeed. Every try carries the same seed and request id,
    so that a retry draws the same picture.
    """

    attempts: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        # gRPC itself caps the attempts at 5, silently.
        if not 1 <= self.attempts <= 5:
            raise ValueError("Retry: attempts must be 1 to 5")
        numbers = (self.initial_backoff, self.max_backoff, self.multiplier)
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("Retry: initial_backoff, max_backoff and multiplier must be finite")
        # Below 2 ms calls hang in gRPC until their deadline, and beyond (grpc/grpc#41036).
        if not 0.01 <= self.initial_backoff <= self.max_backoff or self.multiplier < 1:
            raise ValueError(
                "Retry: 0.01 <= initial_backoff <= max_backoff and multiplier >= 1 must hold"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """An encrypted connection; the fields are paths of PEM files.

    ``ca``: who may vouch for the server; unset, the roots that come with gRPC. ``cert`` and
    ``key``: who this client is, where the server asks (both or none). ``server_name``: the name
    to expect in the server's certificate, where it differs from the address.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS: cert and key go together; only one of them was given")
