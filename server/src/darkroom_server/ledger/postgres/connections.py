"""Connections to the database of a ledger: which are allowed, and what their errors mean."""

import asyncio
import ipaddress
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from darkroom_server.core.errors import LedgerUnreachable, StartupError
from darkroom_server.ledger.postgres.schema import SCHEMA, check

RETRY_SECONDS = 1.0

OPERATION_SECONDS = 5.0
"""The most that one operation takes. A commit takes milliseconds."""

CONNECT_SECONDS = 3.0

MAX_CONNECTIONS = 4
"""Of one server, beside the one of its session: each has one operation at a time."""

UNREACHABLE = (
    "08",
    "25006",
    "28",
    "3D",
    "3F",
    "40",
    "42501",
    "42P01",
    "53",
    "55P03",
    "57",
    "58",
    "XX",
)
"""Classes of SQLSTATE that say something about the database and not about the statement."""

T = TypeVar("T")
Operation = Callable[[asyncpg.Connection], Awaitable[T]]


def check_url(url: str) -> str:
    """``url`` as it is used: encrypted and verified beyond this machine.

    Raises ``StartupError`` for a URL that is not, and for what cannot be read.
    """
    try:
        parts = urlsplit(url)
        hosts = [_host(each) for each in parts.netloc.rpartition("@")[2].split(",")]
        query = parse_qs(parts.query)
    except ValueError as error:
        raise StartupError(f"--ledger: not a URL of PostgreSQL: {error}") from None
    hosts += [host for value in query.get("host", []) for host in value.split(",")]
    hosts = [host for host in hosts if host] or os.environ.get("PGHOST", "").split(",")
    if all(_is_local(host) for host in hosts if host):
        return url
    if modes := query.get("sslmode"):
        if modes[-1] != "verify-full":
            raise StartupError(
                f"--ledger: sslmode={modes[-1]} sends prompts and images to a server that may be "
                "any; use sslmode=verify-full, with sslrootcert=FILE for an authority of your own"
            )
        return url
    return f"{url}{'&' if parts.query else '?'}sslmode=verify-full"


def database_name(url: str) -> str:
    """``url`` without its user, its password and its options, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def unreachable(error: BaseException) -> LedgerUnreachable | None:
    """What callers get if ``error`` is the database's fault; None if it is one of ours."""
    match error:
        case LedgerUnreachable():
            return error
        case TimeoutError():
            why = "it does not answer"
        case asyncpg.PostgresError():
            if not (error.sqlstate or "08").startswith(UNREACHABLE):
                return None
            why = str(error)
        case asyncpg.InterfaceError() | asyncpg.InternalClientError() | OSError():
            why = str(error) or type(error).__name__
        case _:
            return None
    return LedgerUnreachable(
        f"the ledger's database cannot be used: {why}; try again in {RETRY_SECONDS:.0f} s",
        RETRY_SECONDS,
    )


class Connections:
    """A pool of connections to the ledger ``ledger_id`` at ``url``; see ``check_url``."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._settings = {"search_path": SCHEMA, "application_name": f"darkroom {name}"[:63]}
        self._pool: asyncpg.Pool | None = None
        self._ledger_id = ""

    async def open(self, ledger_id: str) -> None:
        """Open the pool."""
        self._ledger_id = ledger_id
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=MAX_CONNECTIONS,
            max_inactive_connection_lifetime=0,
            timeout=CONNECT_SECONDS,
            server_settings=self._settings,
            init=self._check,
            reset=_keep,
        )

    async def close(self) -> None:
        """Close the connections, at once if the database does not answer."""
        if self._pool is not None:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._pool.close()
            except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                self._pool.terminate()
            self._pool = None

    async def connect(self, *, checked: bool = True) -> asyncpg.Connection:
        """A connection of its own; ``checked``: it leads to the ledger of before.

        Raises the errors of asyncpg, and ``LedgerUnreachable`` if it leads to another ledger.
        """
        connection = await asyncpg.connect(
            self._url, timeout=CONNECT_SECONDS, server_settings=self._settings
        )
        if checked:
            try:
                await self._check(connection)
            except BaseException:
                connection.terminate()
                raise
        return connection

    async def run(self, operation: Operation[T]) -> T:
        """What ``operation`` returns; raises ``LedgerUnreachable`` and what it raises itself."""
        if self._pool is None:
            raise RuntimeError("the ledger is not open")
        try:
            connection: Any = await self._pool.acquire(timeout=OPERATION_SECONDS)
            try:
                async with asyncio.timeout(OPERATION_SECONDS):
                    try:
                        return await operation(connection)
                    except asyncpg.InvalidCachedStatementError:
                        # A newer server has migrated the schema; what was done is undone.
                        return await operation(connection)
            except TimeoutError:
                connection.terminate()  # It may hang, and a release would wait for it.
                raise
            finally:
                await self._pool.release(connection, timeout=OPERATION_SECONDS)
        except Exception as error:
            if (away := unreachable(error)) is None:
                raise
            raise away from None

    async def _check(self, connection: asyncpg.Connection) -> None:
        """Raise ``LedgerUnreachable`` if a new connection leads elsewhere; make commits durable."""
        if why := await check(connection, self._ledger_id):
            raise LedgerUnreachable(f"{why}; jobs are accepted once it is back", RETRY_SECONDS)
        await connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )


async def _keep(_: asyncpg.Connection) -> None:
    """Operations leave nothing in their session that must be reset before the next one."""


def _host(netloc: str) -> str:
    """The host of "host:port" or "[::1]:port"."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    return unquote(netloc.partition(":")[0])


def _is_local(host: str) -> bool:
    """Whether ``host`` is this machine: a loopback address, or the folder of a socket."""
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
