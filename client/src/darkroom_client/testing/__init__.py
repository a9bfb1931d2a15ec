"""A fake server in your own process, for tests of code that calls Darkroom.

>>> from darkroom_client import Client
>>> from darkroom_client.testing import Behaviour, FakeServer
>>> with FakeServer() as server, Client(server.target) as client:
...     server.script(Behaviour(queue=2, crash_at_step=3))
...     result = client.generate("a large yellow star", seed=7, steps=4)
>>> result.images[0].seed
7

It has a real port, no weights, and no dependencies but the client's. With pytest, put
``pytest_plugins = ["darkroom_client.testing.plugin"]`` into your top ``conftest.py`` and use the
fixture ``darkroom_server``.
"""

from darkroom_client._types.job import JobState
from darkroom_client.testing._behaviour import Behaviour
from darkroom_client.testing._job import FakeJob
from darkroom_client.testing._models import fake_model
from darkroom_client.testing._server import FakeServer

__all__ = ["Behaviour", "FakeJob", "FakeServer", "JobState", "fake_model"]
