"""The ledger in PostgreSQL, which several servers share. Needs asyncpg, the extra ``fleet``."""

from darkroom_server.ledger.postgres.ledger import PostgresLedger, migrate

__all__ = ["PostgresLedger", "migrate"]
