"""The manifests: kustomize renders them, they follow Kubernetes' schemas, and their parts fit.

No cluster runs here. The custom resources of operators have no schema here either; of them only
what they refer to is checked.
"""

import copy
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from darkroom_server.rpc.health import LIVENESS, READY, Health
from darkroom_server.settings.load import load_settings
from darkroom_server.telemetry.metrics import Metrics
from tests.deploy.names import named
from tests.deploy.test_image import volumes
from tests.deploy.test_systemd import STOP_SECONDS

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
CUSTOM = {
    "Cluster": "postgresql.cnpg.io/v1",
    "GRPCRoute": "gateway.networking.k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "TriggerAuthentication": "keda.sh/v1alpha1",
}
OLDEST, NEWEST = "1.31", "1.35"
"""Versions of Kubernetes whose schemas are compared with."""

Resource = dict[str, Any]

pytestmark = pytest.mark.needs("kubectl")
overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def rendered(overlay: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
    )
    # It warns of deprecated fields on stderr.
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def resources(overlay: str) -> dict[str, dict[str, Resource]]:
    """What an overlay consists of, by kind and name."""
    found: dict[str, dict[str, Resource]] = defaultdict(dict)
    for each in yaml.safe_load_all(rendered(overlay)):
        found[each["kind"]][each["metadata"]["name"]] = each
    return found


def servers(overlay: str) -> Resource:
    spec: Resource = resources(overlay)["StatefulSet"]["darkroom"]["spec"]
    return spec


def pod(overlay: str) -> Resource:
    spec: Resource = servers(overlay)["template"]["spec"]
    return spec


def container(overlay: str) -> Resource:
    (only,) = pod(overlay)["containers"]
    return dict(only)


def settings(overlay: str) -> dict[str, str]:
    """The variables of the server that are in its ConfigMap."""
    (source,) = container(overlay)["envFrom"]
    data: dict[str, str] = resources(overlay)["ConfigMap"][source["configMapRef"]["name"]]["data"]
    return data


def test_there_is_an_overlay_for_each_way_to_run() -> None:
    assert OVERLAYS == ["autoscaled", "cpu", "fleet", "gpu"]


@overlays
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_everything_follows_the_schemas(overlay: str, version: str) -> None:
    known = 0
    for kind, each in resources(overlay).items():
        for resource in each.values():
            if kind in CUSTOM:
                assert resource["apiVersion"] == CUSTOM[kind]
                with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                    kubernetes_validate.validate(resource, version, strict=True)
            else:
                kubernetes_validate.validate(resource, version, strict=True)
                known += 1
    assert known >= 6


@pytest.mark.parametrize(
    ("field", "value"), [("replicas", "two"), ("replica", 2), ("serviceName", 5)]
)
def test_a_wrong_field_is_found(field: str, value: object) -> None:
    wrong = copy.deepcopy(resources("cpu")["StatefulSet"]["darkroom"])
    wrong["spec"][field] = value
    with pytest.raises(kubernetes_validate.ValidationError, match=field):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


@overlays
def test_the_probes_ask_for_the_right_health(overlay: str) -> None:
    probes = {
        name: container(overlay)[f"{name}Probe"] for name in ("startup", "readiness", "liveness")
    }
    asked = {name: probe["grpc"].get("service", "") for name, probe in probes.items()}
    assert asked == {"startup": LIVENESS, "readiness": READY, "liveness": LIVENESS}
    assert set(asked.values()) <= set(Health()._statuses)
    ports = {each["name"]: each["containerPort"] for each in container(overlay)["ports"]}
    assert {probe["grpc"]["port"] for probe in probes.values()} == {ports["grpc"]}


@overlays
def test_a_drain_has_the_time_that_it_needs(overlay: str) -> None:
    set_by_map = {
        name: value for name, value in settings(overlay).items() if not name.endswith("_LEDGER")
    }
    loaded = load_settings({}, set_by_map, None)
    assert loaded.warnings == ()  # Such as an unknown variable.
    needed = loaded.settings.shutdown.drain_delay + loaded.settings.shutdown.grace + STOP_SECONDS
    assert pod(overlay)["terminationGracePeriodSeconds"] >= needed
    # Endpoints disappear after the readiness probe has failed often enough.
    probe = container(overlay)["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"]
    assert loaded.settings.shutdown.drain_delay >= noticed


@overlays
def test_the_server_is_confined(overlay: str) -> None:
    context = pod(overlay)["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["fsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod(overlay)["automountServiceAccountToken"]
    assert container(overlay)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    limits, requests = (container(overlay)["resources"][each] for each in ("limits", "requests"))
    assert {"memory"} <= set(limits)
    assert {"cpu", "memory"} <= set(requests)


@overlays
def test_what_the_server_writes_is_on_volumes(overlay: str) -> None:
    mounts = {each["mountPath"]: each for each in container(overlay)["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == volumes()
    claims = {each["metadata"]["name"] for each in servers(overlay)["volumeClaimTemplates"]}
    others = {each["name"] for each in pod(overlay).get("volumes", ())}
    assert {each["name"] for each in mounts.values()} == claims | others
    assert not claims & others
    # The ledger's file outlives the pod.
    ledger = settings(overlay)["DARKROOM_SERVE_LEDGER"]
    if ledger.startswith("sqlite:"):
        folder = str(Path(ledger.removeprefix("sqlite:")).parent)
        assert mounts[folder]["name"] in claims


@overlays
def test_every_name_refers_to_something(overlay: str) -> None:
    all = resources(overlay)
    labels = servers(overlay)["template"]["metadata"]["labels"]
    for service in all["Service"].values():
        assert service["spec"]["selector"].items() <= labels.items()
        named = {each["name"] for each in container(overlay)["ports"]}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= named
    (budget,) = all["PodDisruptionBudget"].values()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert servers(overlay)["selector"]["matchLabels"].items() <= labels.items()
    headless = all["Service"][servers(overlay)["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None"
    assert pod(overlay)["serviceAccountName"] in all["ServiceAccount"]
    (server_id,) = [
        each["value"]
        for each in container(overlay)["env"]
        if each["name"] == "DARKROOM_SERVE_SERVER_ID"
    ]
    assert server_id == f"$(POD_NAME).{servers(overlay)['serviceName']}:50051"
    for route in all["GRPCRoute"].values():
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                ports = all["Service"][backend["name"]]["spec"]["ports"]
                assert backend["port"] in {each["port"] for each in ports}
    for scaler in all["ScaledObject"].values():
        target = scaler["spec"]["scaleTargetRef"]
        assert target["name"] in all[target["kind"]]
        assert "replicas" not in servers(overlay)
        for trigger in scaler["spec"]["triggers"]:
            if reference := trigger.get("authenticationRef"):
                assert reference["name"] in all["TriggerAuthentication"]


def secrets(overlay: str) -> set[str]:
    """The secrets that something needs."""
    needed = {
        each["valueFrom"]["secretKeyRef"]["name"]
        for each in container(overlay)["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    needed |= {
        each["secret"]["secretName"] for each in pod(overlay).get("volumes", ()) if "secret" in each
    }
    for authentication in resources(overlay)["TriggerAuthentication"].values():
        needed |= {each["name"] for each in authentication["spec"]["secretTargetRef"]}
    return needed


@overlays
def test_the_database_makes_the_secrets_that_the_servers_need(overlay: str) -> None:
    made = set()
    for name in resources(overlay)["Cluster"]:
        made |= {f"{name}-app", f"{name}-ca"}
    assert secrets(overlay) == made


def test_the_fleets_ledger_is_durable_and_its_password_is_in_no_setting() -> None:
    (database,) = resources("fleet")["Cluster"].values()
    spec = database["spec"]
    assert spec["instances"] >= 3
    assert spec["postgresql"]["synchronous"] == {
        "method": "any",
        "number": 1,
        "dataDurability": "required",
    }
    ledger = settings("fleet")["DARKROOM_SERVE_LEDGER"]
    owner, name = (spec["bootstrap"]["initdb"][each] for each in ("owner", "database"))
    # No password before the "@".
    assert ledger.startswith(f"postgresql://{owner}@darkroom-db-rw:5432/{name}?sslmode=verify-full")
    trigger = resources("fleet")["ScaledObject"]["darkroom"]["spec"]["triggers"][0]["metadata"]
    assert (trigger["host"], trigger["userName"], trigger["dbName"]) == (
        "darkroom-db-rw",
        owner,
        name,
    )


def test_the_backlog_that_scales_is_a_metric() -> None:
    (trigger,) = resources("autoscaled")["ScaledObject"]["darkroom"]["spec"]["triggers"]
    declared = {each.name for section in Metrics().declared.values() for each in section}
    assert named(trigger["metadata"]["query"]) == {"darkroom_backlog_seconds"} <= declared
