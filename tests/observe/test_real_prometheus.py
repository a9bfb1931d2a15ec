"""A real Prometheus scrapes a real server, and agrees with what the callers received."""

import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from darkroom.v1 import generation_pb2, generation_pb2_grpc
from tests.deploy.names import family, named
from tests.deploy.test_grafana import DASHBOARDS
from tests.deploy.test_prometheus import RULES
from tools.observe.prometheus import Prometheus, prometheus
from tools.observe.server import Running, server

pytestmark = pytest.mark.needs("prometheus")

GENERATE = 'grpc_server_handled_total{grpc_method="Generate"'


@dataclass
class Seen:
    prometheus: Prometheus
    running: Running
    answers: int = 0
    images: int = 0
    rejected: int = 0
    seconds: float = 0.0


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """What the callers of one short run received; Prometheus has scraped all of it."""
    flags = ("--threads", "1", "--max-rows", "4")
    with server(*flags) as running, prometheus(running.metrics) as scraped:
        seen = Seen(scraped, running)
        with grpc.insecure_channel(running.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            for image_count, steps in ((1, 4), (2, 4), (1, 6), (2, 4)):
                request = generation_pb2.GenerateRequest(
                    prompt="a small red circle", image_count=image_count, steps=steps
                )
                began = time.monotonic()
                response = stub.Generate(request)
                seen.seconds += time.monotonic() - began
                seen.answers += 1
                seen.images += len(response.images)
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    stub.Generate(generation_pb2.GenerateRequest(prompt=""))
                seen.rejected += 1
        scraped.wait_for(f"sum({GENERATE}}}) == {seen.answers + seen.rejected}")
        scraped.wait_for(f"sum(darkroom_request_seconds_count) == {seen.answers + seen.rejected}")
        yield seen


def test_requests_images_and_codes_agree(seen: Seen) -> None:
    total = seen.prometheus.total
    assert total('darkroom_request_seconds_count{outcome="finished"}') == seen.answers
    assert total('darkroom_images_total{outcome="finished"}') == seen.images
    assert total(f'{GENERATE},grpc_code="OK"}}') == seen.answers
    assert total(f'{GENERATE},grpc_code="INVALID_ARGUMENT"}}') == seen.rejected
    assert total('darkroom_rejections_total{reason="invalid_request"}') == seen.rejected
    assert total("darkroom_steps_total") == 4 + 2 * 4 + 6 + 2 * 4


def test_the_stages_add_up_to_the_latency(seen: Seen) -> None:
    finished = seen.prometheus.total('darkroom_request_seconds_sum{outcome="finished"}')
    stages = seen.prometheus.total("darkroom_stage_seconds_sum")
    assert stages == pytest.approx(finished, rel=0.05)
    assert finished <= seen.seconds


def test_the_memory_equals_the_rss_of_the_processes(seen: Seen) -> None:
    (engine,) = psutil.Process(seen.running.pid).children()
    reported = seen.prometheus.total('darkroom_host_memory_bytes{process="engine"}')
    assert reported == pytest.approx(engine.memory_info().rss, rel=0.1)
    reported = seen.prometheus.total('darkroom_gpu_memory_bytes{device="cpu",kind="allocated"}')
    assert reported == pytest.approx(engine.memory_info().rss, rel=0.1)
    own = psutil.Process(seen.running.pid).memory_info().rss
    reported = seen.prometheus.total('darkroom_host_memory_bytes{process="server"}')
    assert reported == pytest.approx(own, rel=0.1)


def test_the_weights_are_reported_by_component(seen: Seen) -> None:
    weights = seen.prometheus.query("darkroom_model_memory_bytes")
    parts = {dict(labels)["component"]: size for labels, size in weights.items()}
    assert set(parts) == {"unet", "vae", "text_encoder"}
    assert (
        1e6
        < sum(parts.values())
        < seen.prometheus.total('darkroom_host_memory_bytes{process="engine"}')
    )


def test_the_rules_are_evaluated(seen: Seen) -> None:
    # The ratio is 0/0 until two scrapes have seen the load.
    seen.prometheus.wait_for("darkroom:occupancy:ratio5m > 0")
    assert 0 < seen.prometheus.total("darkroom:occupancy:ratio5m") <= 1
    stages = seen.prometheus.query("darkroom:stage_seconds:mean5m")
    assert {dict(labels)["stage"] for labels in stages} == {
        "queue",
        "encode_prompt",
        "denoise",
        "decode",
        "encode_image",
    }
    assert seen.prometheus.query('ALERTS{alertstate="firing"}') == {}


def test_every_metric_of_panels_and_rules_is_scraped(seen: Seen) -> None:
    with urllib.request.urlopen(f"http://{seen.running.metrics}/metrics") as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    # The parser removes the suffix of a counter's name.
    scraped = {each.name for each in families} | {f"{each.name}_total" for each in families}
    rules = [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    expressions = [rule["expr"] for rule in rules]
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            expressions += [target["expr"] for target in panel.get("targets", [])]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    wanted = {family(name) for expression in expressions for name in named(expression)}
    assert wanted - recorded <= scraped
