"""A server whose engine takes no time: ``python ledger_server.py [LEDGER]``, logs JSON to stdout.

It runs with the sources on PYTHONPATH, of this checkout or of an earlier commit.
"""

import sys
from typing import Any

import structlog

import darkroom_server
from darkroom_server.app import run
from darkroom_server.backends.fake import FakeEngine
from darkroom_server.settings import Network, Settings


def sections(ledger: str) -> dict[str, Any]:
    """The settings of ``ledger``; a commit without ledgers has no such setting."""
    if not ledger:
        return {}
    from darkroom_server.settings import Storage

    return {"storage": Storage(ledger=ledger)}


if __name__ == "__main__":
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(20),
        processors=[structlog.processors.JSONRenderer()],
    )
    structlog.get_logger().info("imported", path=darkroom_server.__file__)
    network = Network(port=0, metrics_port=0, server_id="bench")
    run(
        Settings(network=network, **sections("".join(sys.argv[1:]))),
        [FakeEngine(auto=True)],
    )
