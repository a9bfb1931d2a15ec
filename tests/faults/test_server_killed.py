"""When the server is killed, its engine ends and its port is free."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from tests.engine.tiny import write_tiny_model


def test_the_engine_ends_and_the_port_is_free(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    flags = ["--model", f"tiny={folder}", "--port", "0", "--metrics-port", "0", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "darkroom_server", "serve", *flags, "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr
        try:
            for line in server.stderr:
                entry = json.loads(line)
                if entry["event"] == "serving":
                    break
            engines = psutil.Process(server.pid).children(recursive=True)
            assert len(engines) == 1
            ours, theirs = (
                Path(f"/proc/{pid}/maps").read_text() for pid in (server.pid, engines[0].pid)
            )
            assert "libtorch" in theirs
            assert "libtorch" not in ours
        finally:
            server.kill()
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert not alive
    host, _, port = entry["address"].rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))
