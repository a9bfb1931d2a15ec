"""For pytest: ``pytest_plugins = ["darkroom_client.testing.plugin"]`` in the top conftest.py."""

from collections.abc import Iterator

import pytest

from darkroom_client.testing._server import FakeServer


@pytest.fixture
def darkroom_server() -> Iterator[FakeServer]:
    """A new ``FakeServer`` for each test."""
    with FakeServer() as server:
        yield server
