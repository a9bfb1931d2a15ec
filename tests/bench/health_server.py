"""A peer's server that only answers health checks, with a process of its own besides."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from bench.peers.servers.config import READY, ServerConfig


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    config = ServerConfig.of_command_line(__doc__)
    subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with HTTPServer(("127.0.0.1", config.port), Handler) as server:
        print(READY, flush=True)
        server.serve_forever()
