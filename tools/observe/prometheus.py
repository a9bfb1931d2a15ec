"""A real Prometheus on loopback, as a context manager."""

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules"
START_SECONDS = 60.0


class Missing(Exception):
    """Prometheus is not installed; the text says how to install it."""


class Prometheus:
    """A running Prometheus, and queries to it."""

    def __init__(self, address: str, process: "subprocess.Popen[bytes]") -> None:
        self.address = address
        self._process = process

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of each series by its sorted labels, without its name."""
        result = self._get("query", query=expression)["result"]
        return {_labels(series["metric"]): float(series["value"][1]) for series in result}

    def total(self, expression: str) -> float:
        """The sum of all series of ``expression``."""
        return sum(self.query(expression).values())

    def over_time(
        self, expression: str, begin: float, end: float, step: float = 1.0
    ) -> dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]:
        """Pairs (seconds since ``begin``, value) of each series; arguments as ``time.time``."""
        result = self._get("query_range", query=expression, start=begin, end=end, step=step)
        return {
            _labels(each["metric"]): [(at - begin, float(value)) for at, value in each["values"]]
            for each in result["result"]
        }

    def wait_for(self, expression: str, timeout: float = START_SECONDS) -> None:
        """Wait until ``expression`` has a result; raises ``TimeoutError``."""
        until = time.monotonic() + timeout
        while not self._ready() or not self.query(expression):
            if time.monotonic() > until or self._process.poll() is not None:
                raise TimeoutError(f"Prometheus has no answer to {expression} yet")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def _get(self, what: str, **parameters: object) -> dict[str, Any]:
        query = urllib.parse.urlencode(parameters)
        url = f"http://{self.address}/api/v1/{what}?{query}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data


@contextmanager
def prometheus(target: str, *, window: str = "5m") -> Iterator[Prometheus]:
    """A Prometheus that scrapes ``target`` each second, with our rules over ``window``.

    Raises ``Missing`` if it is not installed.
    """
    if shutil.which("prometheus") is None:
        raise Missing("`prometheus` is not installed: apt-get install prometheus")
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        (folder / "rules").mkdir()
        for path in RULES.glob("*.yml"):
            text = path.read_text().replace("[5m]", f"[{window}]")
            (folder / "rules" / path.name).write_text(text)
        (folder / "prometheus.yml").write_text(_config(target))
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
                "--log.level=error",
            ]
        )
        try:
            running = Prometheus(address, process)
            running.wait_for('up{job="darkroom"} == 1')
            yield running
        finally:
            process.terminate()
            process.wait()


def _config(target: str) -> str:
    return f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["rules/*.yml"]
scrape_configs:
  - job_name: darkroom
    static_configs: [{{targets: ["{target}"]}}]
"""


def _labels(metric: dict[str, str]) -> tuple[tuple[str, str], ...]:
    left_out = ("__name__", "job", "instance")
    return tuple(sorted((name, value) for name, value in metric.items() if name not in left_out))
