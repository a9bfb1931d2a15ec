"""The dashboards and the composition name only metrics, rules and files that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from darkroom_server.telemetry.metrics import Metrics
from tests.deploy.names import family, named
from tests.deploy.test_prometheus import RULES

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


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


def test_there_are_dashboards_with_distinct_ids() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards) > 0


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_queries_declared_or_recorded_metrics(path: Path) -> None:
    panels = [p for p in json.loads(path.read_text())["panels"] if p["type"] != "row"]
    assert panels
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = named(target["expr"])
            assert names, target["expr"]
            assert {family(one) for one in names} <= declared() | recorded().keys()


SELECTOR = re.compile(r"\b((?:darkroom|grpc_server)_[a-z0-9_]+)(?:\{([^}]*)\})?")
INSTANCE, MODEL = 'instance=~"$instance"', 'model=~"$model"'


def missing_filters(expression: str) -> list[str]:
    """The metrics in ``expression`` that the dashboards' variables do not select."""
    labels = {each.name: each.labels for parts in Metrics().declared.values() for each in parts}
    missing = []
    for name, given in SELECTOR.findall(expression):
        filters = given.split(", ")
        needed = [INSTANCE, *([MODEL] if "model" in labels[family(name)] else [])]
        if not set(needed) <= set(filters):
            missing.append(name)
    return missing


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_shows_the_chosen_servers_and_models(path: Path) -> None:
    board = json.loads(path.read_text())
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "model"]
    for name in ("instance", "model"):
        assert variables[name]["includeAll"]
        assert variables[name]["multi"]
        assert named(variables[name]["definition"]) <= declared()
    for expression in expressions(path):
        assert missing_filters(expression) == []


def test_a_metric_without_the_variables_is_found() -> None:
    good = f"darkroom_queue_depth{{{INSTANCE}, {MODEL}}}"
    assert missing_filters(good) == []
    assert missing_filters(f"darkroom_queue_depth{{{INSTANCE}}} + {good}") == [
        "darkroom_queue_depth"
    ]
    assert missing_filters("darkroom_ready") == ["darkroom_ready"]


def expressions(path: Path) -> list[str]:
    panels = json.loads(path.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


@pytest.mark.needs("promtool")
def test_every_panels_query_is_valid(tmp_path: Path) -> None:
    found = [expression for path in DASHBOARDS for expression in expressions(path)]
    rules = [{"record": f"panel:{index}", "expr": each} for index, each in enumerate(found)]
    file = tmp_path / "panels.yml"
    for more, valid in ([], True), ([{"record": "panel:wrong", "expr": "sum by ("}], False):
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules + more}]}))
        done = subprocess.run(
            ["promtool", "check", "rules", file], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) is valid, done.stderr


def test_every_rule_queries_declared_or_recorded_metrics() -> None:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                known = declared() | recorded().keys()
                assert {family(one) for one in named(rule["expr"])} <= known


def test_the_panels_do_not_overlap() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_the_composition_mounts_existing_folders() -> None:
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
    assert job["job_name"] == "darkroom"  # The alerts use this name.
    assert job["static_configs"] == [{"targets": ["darkroom:9464"]}]
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
