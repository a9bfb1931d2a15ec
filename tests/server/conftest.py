import pytest

from tests.server.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the test."""
    return Clock(monkeypatch)
