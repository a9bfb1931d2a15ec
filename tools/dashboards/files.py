"""The dashboards as files, as Grafana's provisioning reads them."""

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tools.dashboards.engine import engine
from tools.dashboards.latency import latency
from tools.dashboards.memory import memory
from tools.dashboards.overview import overview

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"


def files() -> dict[str, str]:
    """The text of each file, by its name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    boards = {"overview": overview, "latency": latency, "memory": memory, "engine": engine}
    return {f"{name}.json": encoder.encode(make().build()) + "\n" for name, make in boards.items()}
