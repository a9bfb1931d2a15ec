"""The dashboards are those that the code builds, and ask for what there is."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from darkroom_server.telemetry.metrics import Metrics
from tests.deploy.names import family, named
from tests.deploy.test_prometheus import RULES
from tools.dashboards.files import FOLDER, files

DEPLOY = Path(__file__).parents[2] / "deploy"


def declared() -> set[str]:
    return {each.name for section in Metrics().declared.values() for each in section}


def recorded() -> dict[str, str]:
    return {
        rule["record"]: rule["expr"]
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def panels(name: str) -> list[dict[str, Any]]:
    board = json.loads(files()[name])
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("name", files())
def test_the_files_are_current(name: str) -> None:
    """`python -m tools.dashboards` mends this."""
    assert (FOLDER / name).read_text() == files()[name]


def test_no_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(files())


@pytest.mark.parametrize("name", files())
def test_every_panel_asks_for_what_is_declared_or_recorded(name: str) -> None:
    assert panels(name)
    for panel in panels(name):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = named(target["expr"])
            assert names, target["expr"]
            assert {family(one) for one in names} <= declared() | recorded().keys()


def test_every_rule_asks_for_what_is_declared_or_recorded() -> None:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                known = declared() | recorded().keys()
                assert {family(one) for one in named(rule["expr"])} <= known


def test_the_panels_do_not_overlap() -> None:
    for name in files():
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(files()[name])["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_the_composition_mounts_what_there_is() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"darkroom", "prometheus", "grafana"}
    for service in services.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_dir()
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["job_name"] == "darkroom"  # The alerts know it by that name.
    assert job["static_configs"] == [{"targets": ["darkroom:9464"]}]
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
