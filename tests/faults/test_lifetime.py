"""What the tools start ends with them, whatever ends them."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = """
import signal
from tools.lifetime import exit_on_sigterm
from tools.postgres import cluster

exit_on_sigterm()
with cluster() as made:
    print(made.port, flush=True)
    print(made.folder, flush=True)
    signal.pause()
"""


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.needs("postgresql")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_database_ends_with_the_program_that_started_it(number: signal.Signals) -> None:
    command = [sys.executable, "-c", MAIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            port, folder = int(process.stdout.readline()), Path(process.stdout.readline().strip())
            assert accepts(port)
            assert folder.is_dir()
            process.send_signal(number)
            assert process.wait(60) == (128 + number if number == signal.SIGTERM else -number)
        finally:
            process.kill()
    deadline = time.monotonic() + 60
    # It removes this file after its port, as the last thing that it does.
    while accepts(port) or (folder / "data" / "postmaster.pid").exists():
        assert time.monotonic() < deadline
    if number == signal.SIGTERM:
        assert not folder.exists()
    else:
        shutil.rmtree(folder)
