"""The schema of the PostgreSQL ledger, and the migrations that make it."""

import asyncpg

from darkroom_server.core.errors import StartupError

SCHEMA = "darkroom"

MIGRATION_LOCK = 0x44524C31
"""Servers that start at once migrate one after the other: "DRL1"."""

OLDEST_SCHEMA = 1
"""The oldest schema whose servers can use the newest one beside newer servers."""

MIGRATIONS = (
    """
    CREATE TABLE ledger (
        id uuid NOT NULL DEFAULT gen_random_uuid(),
        version int NOT NULL,
        oldest int NOT NULL
    );
    INSERT INTO ledger (version, oldest) VALUES (0, 0);
    CREATE SEQUENCE session_locks AS int CYCLE;
    CREATE TABLE servers (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        name text NOT NULL,
        lock int NOT NULL,
        address text NOT NULL,
        key text NOT NULL,
        certificate bytea NOT NULL,
        models text[] NOT NULL,
        opened_at float8 NOT NULL,
        renewed_at float8 NOT NULL
    ) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 500);
    CREATE TABLE jobs (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        caller text NOT NULL,
        request_id text NOT NULL,
        fingerprint bytea NOT NULL,
        record bytea NOT NULL,
        model text NOT NULL,
        counted_as text NOT NULL,
        detached boolean NOT NULL,
        goal float8 NOT NULL,
        accepted_at float8 NOT NULL,
        queued_at float8 NOT NULL,
        deadline float8,
        state smallint NOT NULL,
        owner bigint,
        epoch int NOT NULL,
        losses int NOT NULL DEFAULT 0,
        extended boolean NOT NULL DEFAULT false,
        ended_at float8,
        failure text,
        UNIQUE (caller, request_id)
    ) WITH (
        fillfactor = 70,
        autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0
    );
    CREATE INDEX jobs_queued ON jobs (goal, id) INCLUDE (model) WHERE state = 0;
    CREATE INDEX jobs_deadline ON jobs (deadline) WHERE state = 0 AND deadline IS NOT NULL;
    CREATE INDEX jobs_claimed ON jobs (owner) WHERE state = 1;
    CREATE INDEX jobs_live ON jobs (counted_as) WHERE state < 2;
    CREATE INDEX jobs_ended ON jobs (ended_at) WHERE state >= 2;
    CREATE TABLE inputs (
        digest text PRIMARY KEY,
        bytes bigint NOT NULL,
        data bytea NOT NULL
    );
    CREATE TABLE job_inputs (
        job bigint NOT NULL REFERENCES jobs ON DELETE CASCADE,
        digest text NOT NULL REFERENCES inputs,
        PRIMARY KEY (job, digest)
    );
    CREATE INDEX job_inputs_digest ON job_inputs (digest);
    """,
    """
    ALTER TABLE jobs ADD COLUMN runtime text;
    ALTER TABLE servers ADD COLUMN runtimes text[] NOT NULL DEFAULT '{}';
    ALTER TABLE servers ADD COLUMN held text[] NOT NULL DEFAULT '{}';
    DROP INDEX jobs_deadline;
    """,
    """
    ALTER TABLE jobs ADD COLUMN needs text[] NOT NULL DEFAULT '{}';
    ALTER TABLE servers ADD COLUMN offers text[];
    """,
    """
    ALTER TABLE jobs ADD COLUMN calls_at bigint;
    """,
)
"""What makes each version of the schema from the one before; never change one that was released.

Servers of the versions from ``OLDEST_SCHEMA`` on go on while a newer one migrates.
"""


async def prepare(connection: asyncpg.Connection, database: str) -> str:
    """Create or migrate the schema if needed; returns the id of the ledger.

    ``database``: its name for messages. Raises ``StartupError``: the role may not do that, or the
    schema is newer than this server.
    """
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
            version, oldest = await _version(connection)
            if oldest > len(MIGRATIONS):
                raise StartupError(
                    f"the ledger in {database} has schema {version}, of a newer darkroom-server, "
                    f"and this one knows {len(MIGRATIONS)}; install that version again"
                )
            if version < len(MIGRATIONS):
                await _migrate(connection, version)
            return str(await connection.fetchval(f"SELECT id FROM {SCHEMA}.ledger"))
    except asyncpg.InsufficientPrivilegeError as error:
        raise StartupError(
            f"the ledger in {database} is to have schema {len(MIGRATIONS)}, and this role may not "
            f"make it ({error}): run `darkroom-server migrate-ledger` as a role that may, and "
            "grant this one what docs/durability.md says"
        ) from None


async def check(connection: asyncpg.Connection, ledger_id: str) -> str:
    """Why a new connection leads to another ledger than ``ledger_id``; "" if it does not."""
    try:
        found = str(await connection.fetchval(f"SELECT id FROM {SCHEMA}.ledger"))
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return "the database has no ledger, and it had one when this server started"
    return "" if found == ledger_id else "the database has another ledger than before"


async def _version(connection: asyncpg.Connection) -> tuple[int, int]:
    if await connection.fetchval("SELECT to_regclass($1) IS NULL", f"{SCHEMA}.ledger"):
        tables = await connection.fetchval(
            "SELECT count(*) FROM pg_tables WHERE schemaname = $1", SCHEMA
        )
        if tables:
            raise StartupError(
                f"the schema {SCHEMA!r} of the database is of another program; use another database"
            )
        return 0, 0
    row = await connection.fetchrow(f"SELECT version, oldest FROM {SCHEMA}.ledger")
    return row["version"], row["oldest"]


async def _migrate(connection: asyncpg.Connection, version: int) -> None:
    if version == 0:
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    await connection.execute(f"SET LOCAL search_path = {SCHEMA}")
    for script in MIGRATIONS[version:]:
        await connection.execute(script)
    await connection.execute(
        "UPDATE ledger SET version = $1, oldest = $2", len(MIGRATIONS), OLDEST_SCHEMA
    )
