"""Who may change what the server holds, such as the adapters on offer."""

import ipaddress

from darkroom_server.core.caller import Caller
from darkroom_server.core.errors import NotAllowed


class AdminPolicy:
    """With ``tokens``, callers whose token says ``admin = true``; else callers on this machine."""

    def __init__(self, *, tokens: bool) -> None:
        self._tokens = tokens

    def check(self, caller: Caller, *, forwarded: bool) -> None:
        """Raise ``NotAllowed`` unless ``caller`` may change what the server holds.

        ``forwarded``: a proxy has passed the call on. Without tokens it is rejected then, because
        a proxy on this machine makes every caller look like one on this machine.
        """
        if self._tokens:
            if not caller.admin:
                raise NotAllowed(
                    "this changes what the server holds, which is for callers whose token says "
                    f"admin = true, and that of {caller.name!r} does not"
                )
        elif forwarded or not _is_loopback(caller.address):
            raise NotAllowed(
                "this changes what the server holds, which a server without --tokens allows from "
                "its own machine only, and not through a proxy"
            )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # A network of IPv6, or not an address at all.
