import pytest

from darkroom_server.dispatch.engines import pool


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart an engine after a crash almost at once."""
    monkeypatch.setattr(pool, "FIRST_BACKOFF_SECONDS", 0.001)
