"""The file of the SQLite ledger: who may open it, how, and which schema it has."""

import fcntl
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from darkroom_server.core.errors import StartupError

APPLICATION_ID = 0x44524C31
"""Marks the file as a ledger of Darkroom: "DRL1"."""

BUSY_SECONDS = 2.0
"""How long an operation waits for another program that has the file locked, such as a backup."""

MIGRATIONS = (
    """
    CREATE TABLE servers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        opened_at REAL NOT NULL,
        renewed_at REAL NOT NULL
    );
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        caller TEXT NOT NULL,
        request_id TEXT NOT NULL,
        fingerprint BLOB NOT NULL,
        record BLOB NOT NULL,
        model TEXT NOT NULL,
        counted_as TEXT NOT NULL,
        detached INTEGER NOT NULL,
        goal REAL NOT NULL,
        accepted_at REAL NOT NULL,
        deadline REAL,
        state INTEGER NOT NULL,
        owner INTEGER,
        epoch INTEGER NOT NULL,
        losses INTEGER NOT NULL DEFAULT 0,
        ended_at REAL,
        failure TEXT,
        UNIQUE (caller, request_id)
    );
    CREATE INDEX jobs_queued ON jobs (goal) WHERE state = 0;
    CREATE INDEX jobs_claimed ON jobs (owner) WHERE state = 1;
    CREATE INDEX jobs_live ON jobs (counted_as) WHERE state < 2;
    CREATE INDEX jobs_ended ON jobs (ended_at) WHERE state >= 2;
    CREATE TABLE inputs (
        digest TEXT PRIMARY KEY,
        bytes INTEGER NOT NULL,
        data BLOB NOT NULL
    );
    CREATE TABLE job_inputs (
        job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
        digest TEXT NOT NULL REFERENCES inputs,
        PRIMARY KEY (job, digest)
    ) WITHOUT ROWID;
    CREATE INDEX job_inputs_digest ON job_inputs (digest);
    CREATE TRIGGER last_job_of_input AFTER DELETE ON job_inputs
    WHEN NOT EXISTS (SELECT 1 FROM job_inputs WHERE digest = OLD.digest)
    BEGIN
        DELETE FROM inputs WHERE digest = OLD.digest;
    END;
    """,
    """
    ALTER TABLE jobs ADD COLUMN runtime TEXT;
    """,
    """
    ALTER TABLE jobs ADD COLUMN needs TEXT NOT NULL DEFAULT '[]';
    """,
)
"""What makes each version of the schema from the one before; never change one that was released."""


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """An open ledger file: its connection, and the descriptor of the lock that no other has."""

    connection: sqlite3.Connection
    lock: int


def open_ledger_file(path: Path, *, busy_seconds: float = BUSY_SECONDS) -> LedgerFile:
    """Lock, open and, if needed, create or migrate the ledger at ``path``.

    Raises ``StartupError`` with the reason and a remedy. The connection commits nothing by itself.
    """
    try:
        lock = _locked(path)
    except OSError as error:
        raise StartupError(
            f"cannot open the ledger {path}: {error.strerror}; --ledger needs a file in a folder "
            "that can be written"
        ) from None
    try:
        connection = _connected(path, busy_seconds)
    except BaseException:
        os.close(lock)
        raise
    return LedgerFile(connection, lock)


def _locked(path: Path) -> int:
    """The lock beside the ledger, held until it is closed or the process ends in any way.

    A lock of its own, because closing any other descriptor of the ledger would lose SQLite's locks.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StartupError(
            f"another server has the ledger {path}; stop it, or give this one another --ledger"
        ) from None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(path, 0o600)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _connected(path: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=busy_seconds, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        _migrate(connection, path)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            # Prompts and pictures of deleted entries must not stay in free pages.
            "secure_delete = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error as error:
        connection.close()
        raise StartupError(
            f"cannot use the ledger {path}: {error}; move it away, or restore a backup"
        ) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version, application = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("user_version", "application_id")
    )
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION_ID:
        raise StartupError(f"{path} is a database of another program; choose another --ledger")
    if version > len(MIGRATIONS):
        raise StartupError(
            f"the ledger {path} has schema {version}, of a newer darkroom-server, and this one "
            f"knows {len(MIGRATIONS)}; install that version again"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {number}; COMMIT;"
        )
