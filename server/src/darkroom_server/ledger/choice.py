"""The ledger that a setting names."""

import socket
from pathlib import Path

from darkroom_server.core.ledger import Ledger
from darkroom_server.ledger.memory import MemoryLedger
from darkroom_server.ledger.sqlite import SqliteLedger


def chosen_ledger(
    setting: str, server_id: str | None, *, retention: float, max_input_bytes: int
) -> Ledger:
    """The ledger of ``--ledger``, not open yet.

    ``server_id``: the name of this server, None for that of its host. ``retention``: seconds that
    ended jobs stay in a file. ``max_input_bytes``: of the pictures of all its jobs.
    """
    name = server_id or socket.gethostname()
    path = ledger_file(setting)
    if path is None:
        # The result store keeps ended jobs; there is nobody else who would ask for them.
        return MemoryLedger(name=name)
    return SqliteLedger(path, name=name, retention=retention, max_input_bytes=max_input_bytes)


def ledger_file(setting: str) -> Path | None:
    """The file of ``--ledger``, None without one."""
    kind, _, path = setting.partition(":")
    return Path(path).expanduser().absolute() if kind == "sqlite" else None
