"""Clients and servers of 0.1.0 and of this checkout work with each other, over the real wire."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from prometheus_client.parser import text_string_to_metric_families

from darkroom.v1 import generation_pb2, image_pb2, model_pb2, server_pb2
from darkroom_client import Client, ModelState, Unsupported

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLD_COMMIT = "6b7e7f093cf9c05ac0abc68342ea316ce10c119e"
"""The last commit of 0.1.0 before the packages were restructured."""

PACKAGES = ("protos/src", "client/src", "server/src")
CALLS_SECONDS = 60

NEW_CALLS: dict[str, Callable[[Client], object]] = {
    "darkroom.v1.GenerationService/GetGeneration": lambda client: client.job("a-job"),
    "darkroom.v1.GenerationService/ListGenerations": lambda client: list(client.jobs()),
    "darkroom.v1.ModelService/ListAdapters": lambda client: client.adapters(),
    "darkroom.v1.ModelService/LoadModel": lambda client: client.load_model("demo"),
    "darkroom.v1.ModelService/UnloadModel": lambda client: client.unload_model("demo"),
    "darkroom.v1.ModelService/PinModel": lambda client: client.pin_model("demo"),
    "darkroom.v1.ModelService/AddAdapter": lambda client: client.add_adapter("neon"),
    "darkroom.v1.ModelService/RemoveAdapter": lambda client: client.remove_adapter("neon"),
    # Too large for a message, so it is uploaded.
    "darkroom.v1.ImageService/UploadImage": lambda client: client.generate(
        "a star", image=bytes(2 << 20)
    ),
}
"""How to make each call that 0.1.0 did not have, by the name of its RPC."""


@dataclass(frozen=True, slots=True)
class Version:
    """The folder that holds the three packages of one version."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "DARKROOM" not in name}
        path = os.pathsep.join(str(self.folder / package) for package in PACKAGES)
        return {**kept, "PYTHONPATH": path}


NEW = Version(ROOT)


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Version 0.1.0 from the history of this repository, without the weights of its demo model."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{OLD_COMMIT}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if known.returncode:
        pytest.skip(f"the history lacks 0.1.0 ({OLD_COMMIT:.8}): `git fetch --unshallow` adds it")
    folder = tmp_path_factory.mktemp("compat")
    without = ":(exclude)server/src/darkroom_server/demo_model"
    archive = subprocess.run(
        ["git", "archive", OLD_COMMIT, "--", *PACKAGES, without],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return Version(folder)


@dataclass(frozen=True, slots=True)
class Serving:
    """The addresses of a server: for calls, and for scrapes."""

    address: str
    metrics: str

    def called(self) -> set[str]:
        """The RPCs that were called at least once, successfully or not."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return {
            f"{sample.labels['grpc_service']}/{sample.labels['grpc_method']}"
            for family in families
            for sample in family.samples
            if sample.name == "grpc_server_started_total" and sample.value
        }


@contextmanager
def serving(version: Version, *without: str) -> Iterator[Serving]:
    """A server of ``version`` with the fake engine, ready, lacking the services ``without``."""
    command = [sys.executable, "-P", str(HERE / "serve.py"), *without]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=version.environment
    ) as process:
        assert process.stdout is not None
        try:
            imported = json.loads(process.stdout.readline())
            assert imported["path"].startswith(f"{version.folder}/server/src/")
            for line in process.stdout:
                if (entry := json.loads(line))["event"] == "serving":
                    break
            else:
                pytest.fail(f"the server ended with {process.wait()} before it was ready")
            yield Serving(entry["address"], entry["metrics"])
        finally:
            process.kill()


def make_all_calls(version: Version, address: str) -> None:
    """Run every call of the SDK of ``version``."""
    done = subprocess.run(
        [sys.executable, "-P", HERE / "calls.py", address],
        capture_output=True,
        text=True,
        check=False,
        timeout=CALLS_SECONDS,
        env=version.environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{version.folder}/client/src/")


def old_rpcs() -> set[str]:
    baseline = (ROOT / "protos" / "baseline.binpb").read_bytes()
    return {
        f"{file.package}.{service.name}/{method.name}"
        for file in descriptor_pb2.FileDescriptorSet.FromString(baseline).file
        for service in file.service
        for method in service.method
    }


def new_rpcs() -> set[str]:
    return {
        f"{service.full_name}/{method.name}"
        for module in (generation_pb2, image_pb2, model_pb2, server_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    } - old_rpcs()


def test_a_client_of_0_1_0_makes_every_call_to_this_server(old: Version) -> None:
    with serving(NEW) as server:
        make_all_calls(old, server.address)
        assert server.called() >= old_rpcs()


def test_this_client_makes_every_call_to_a_server_of_0_1_0(old: Version) -> None:
    with serving(old) as server:
        make_all_calls(NEW, server.address)
        assert server.called() >= old_rpcs()


def test_a_loaded_model_of_0_1_0_is_resident(old: Version) -> None:
    with serving(old) as server, Client(server.address, insecure=True) as client:
        (model,) = client.models()
        assert (model.ready, model.state) == (True, ModelState.RESIDENT)
        assert (model.weight_bytes, model.last_used, model.pinned) == (0, None, False)


def test_a_call_that_0_1_0_did_not_have_is_unsupported_there(old: Version) -> None:
    assert NEW_CALLS.keys() == new_rpcs()
    with serving(old) as server, Client(server.address, insecure=True) as client:
        for call in NEW_CALLS.values():
            with pytest.raises(Unsupported, match="not older than this client"):
                call(client)


def test_a_call_of_a_service_that_the_server_lacks_is_unsupported(old: Version) -> None:
    with (
        serving(old, "ServerService") as server,
        Client(server.address, insecure=True) as client,
        pytest.raises(Unsupported, match=r"does not offer this call.*not older than this client"),
    ):
        client.status()
