"""The ledger that a setting names."""

import importlib
import socket
from pathlib import Path
from types import ModuleType

from darkroom_server.core.errors import StartupError
from darkroom_server.core.ledger import Ledger, SharedLedger
from darkroom_server.ledger.input_limits import InputLimits
from darkroom_server.ledger.memory import MemoryLedger
from darkroom_server.ledger.sqlite import SqliteLedger


def chosen_ledger(
    setting: str, server_id: str | None, *, retention: float, inputs: InputLimits
) -> Ledger:
    """The ledger of ``--ledger``, not open yet.

    ``server_id``: the name of this server, None for that of its host. ``retention``: seconds that
    ended jobs stay in a file. ``inputs``: how much the pictures of its jobs may take. Raises
    ``StartupError`` if it cannot be used.
    """
    name = server_id or socket.gethostname()
    if is_shared(setting):
        shared: SharedLedger = _postgres().PostgresLedger(
            setting, name=name, retention=retention, inputs=inputs
        )
        return shared
    path = ledger_file(setting)
    if path is None:
        # The result store keeps ended jobs; there is nobody else who would ask for them.
        return MemoryLedger(name=name)
    return SqliteLedger(path, name=name, retention=retention, inputs=inputs)


def _postgres() -> ModuleType:
    """The package of the ledger in PostgreSQL, whose library is an extra."""
    try:
        return importlib.import_module("darkroom_server.ledger.postgres")
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise StartupError(
            "--ledger postgresql: needs asyncpg: pip install 'darkroom-server[fleet]'"
        ) from None


def is_shared(setting: str) -> bool:
    """Whether several servers can have the ledger of ``--ledger`` open at once."""
    return setting.partition(":")[0] in ("postgresql", "postgres")


async def migrate(setting: str) -> str:
    """Create or migrate the ledger of ``--ledger`` if that is needed; returns a line about it.

    Raises ``StartupError``.
    """
    if not is_shared(setting):
        raise StartupError("a server migrates this ledger itself: only PostgreSQL needs it")
    line: str = await _postgres().migrate(setting)
    return line


def ledger_file(setting: str) -> Path | None:
    """The file of ``--ledger``, None without one."""
    kind, _, path = setting.partition(":")
    return Path(path).expanduser().absolute() if kind == "sqlite" else None
