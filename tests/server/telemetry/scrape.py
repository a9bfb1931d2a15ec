"""The metrics of a server under test, as Prometheus reads them."""

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.server.wire import Wire

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def scrape(wire: Wire, accept: str = "text/plain") -> str:
    """The page of ``/metrics``."""

    def read() -> str:
        request = urllib.request.Request(
            f"http://{wire.server.metrics_address}/metrics", headers={"Accept": accept}
        )
        with urllib.request.urlopen(request) as page:
            body: bytes = page.read()
            return body.decode()

    return await asyncio.to_thread(read)


async def values(wire: Wire, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The samples called ``name``, by the values of ``labels``."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(await scrape(wire))
        for sample in family.samples
        if sample.name == name
    }


async def counted(wire: Wire, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Like ``values``, without the zeros."""
    return {key: value for key, value in (await values(wire, name, *labels)).items() if value}
