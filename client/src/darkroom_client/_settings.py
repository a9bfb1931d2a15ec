"""A client's settings, resolved from its arguments and the environment."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from darkroom_client._checks import check_seconds, check_text
from darkroom_client._traces import current_traceparent
from darkroom_client._types.connection import TLS, Keepalive, Retry

Metadata = tuple[tuple[str, str], ...]
"""The metadata of a call, in gRPC's form."""

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 120.0
DEFAULT_KEEPALIVE = Keepalive()
DEFAULT_RETRY = Retry()
DEFAULT_MAX_REPLY_BYTES = 64 * 2**20

_SCHEME = re.compile(r"(dns|unix|unix-abstract|vsock|ipv4|ipv6|xds):")
_HOST_PORT = re.compile(r"(\[[^]]+\]|[^][:/]+):[0-9]+")
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_UNENCRYPTED = (
    "a token would be sent unencrypted: pass tls=TLS(...) (or set DARKROOM_CA), or "
    "insecure=True if the network is private"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a client, complete and checked.

    ``target``: one target, or several addresses with commas between them.
    """

    target: str
    tls: TLS | None
    token: str | None = field(repr=False)
    insecure: bool
    timeout: float | None
    keepalive: Keepalive
    retry: Retry
    max_reply_bytes: int

    @classmethod
    def resolve(
        cls,
        *,
        target: str | Sequence[str] | None,
        tls: TLS | None,
        token: str | None,
        insecure: bool,
        timeout: float | None,
        keepalive: Keepalive,
        retry: Retry,
        max_reply_bytes: int,
    ) -> Self:
        """Fill unset arguments from the environment; raises ``ValueError`` for invalid ones.

        Arguments override DARKROOM_TARGET, DARKROOM_TOKEN and DARKROOM_CA.
        """
        if insecure and tls is not None:
            raise ValueError("insecure=True means no TLS: pass either insecure or tls")
        if tls is None and not insecure and (ca := os.environ.get("DARKROOM_CA")):
            tls = TLS(ca=ca)
        token = token or os.environ.get("DARKROOM_TOKEN") or None
        if token and tls is None and not insecure:
            raise ValueError(_UNENCRYPTED)
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII, without a line break")
        check_seconds("timeout", timeout)
        if target is not None and not isinstance(target, str):
            target = _join(target)
        if max_reply_bytes < 1:
            raise ValueError("max_reply_bytes must be at least 1")
        return cls(
            target=_check_target(target or os.environ.get("DARKROOM_TARGET") or DEFAULT_TARGET),
            tls=tls,
            token=token,
            insecure=insecure,
            timeout=timeout,
            keepalive=keepalive,
            retry=retry,
            max_reply_bytes=max_reply_bytes,
        )

    @property
    def targets(self) -> list[str]:
        """The targets of the servers; a target of gRPC is one, with all its addresses."""
        return split_targets(self.target)

    def deadline(self, timeout: float | None) -> float | None:
        """The seconds that a call may take: its own ``timeout``, or else the client's."""
        check_seconds("timeout", timeout)
        return self.timeout if timeout is None else timeout

    def metadata(self, extra: Mapping[str, str] | None = None) -> Metadata:
        """The metadata of a call that is made now: the client's, the trace's and ``extra``.

        Raises ``TypeError`` for a key or value that is not a string, and ``ValueError`` for one
        that cannot be sent, or for a token that would be sent unencrypted.
        """
        pairs = {"darkroom-max-reply-bytes": str(self.max_reply_bytes)}
        if self.token:
            pairs["authorization"] = f"Bearer {self.token}"
        for key, value in (extra or {}).items():
            check_text("a key of metadata", key)
            check_text(f"metadata {key!r}", value)
            name = key.lower()
            if not _METADATA_KEY.fullmatch(name) or name.endswith("-bin"):
                raise ValueError(f"metadata {key!r}: a key is made of a-z 0-9 . _ - and no '-bin'")
            if name.startswith("grpc-") or name in pairs:
                raise ValueError(f"metadata {key!r}: this name belongs to the client itself")
            if not (value.isascii() and value.isprintable()):
                raise ValueError(f"metadata {key!r}: a value must be printable ASCII")
            if name == "authorization" and self.tls is None and not self.insecure:
                raise ValueError(f"metadata {key!r}: {_UNENCRYPTED}")
            pairs[name] = value
        # A program without OpenTelemetry has no span; do not import it for that.
        traces = "opentelemetry.trace" in sys.modules
        if traces and "traceparent" not in pairs and (traceparent := current_traceparent()):
            pairs["traceparent"] = traceparent
        return tuple(pairs.items())


def split_targets(target: str) -> list[str]:
    """The addresses in ``target``, or itself if it is one target."""
    return [target] if _SCHEME.match(target) else target.split(",")


def _join(targets: Sequence[str]) -> str:
    if not targets:
        raise ValueError("target is an empty list: name at least one host:port")
    for target in targets if len(targets) > 1 else ():
        if _SCHEME.match(target) or "," in target:
            raise ValueError(
                f"target {target!r}: in a list of several, write each server as host:port"
            )
    return ",".join(targets)


def _check_target(target: str) -> str:
    if len(split_targets(target)) > 1:
        for each in target.split(","):
            _check_target(each)
        return target
    if "://" in target and not _SCHEME.match(target):
        raise ValueError(f"target {target!r}: write host:port, without a scheme such as http://")
    if not _SCHEME.match(target) and not _HOST_PORT.fullmatch(target):
        raise ValueError(f"target {target!r} names no port: write host:port or [ipv6]:port")
    return target
