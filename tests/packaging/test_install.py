"""Installs the wheels into separate environments. This needs a package index, hence slow."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.packaging.distributions import CONSTRAINTS, ROOT, Distributions, Environment, Wheel

pytestmark = pytest.mark.slow

IMPORT_SECONDS = 0.3
ROUND_TRIP = ROOT / "tests/packaging/round_trip.py"


def test_the_client_works_with_the_newest_versions_and_no_extras(
    distributions: Distributions, environment: Environment
) -> None:
    environment.install("-c", CONSTRAINTS, distributions.protos.path, distributions.client.path)
    environment.pip("check")
    lines = environment.pip("list", "--format=freeze").splitlines()
    installed = {line.split("==")[0].lower() for line in lines}
    assert "darkroom-client" in installed
    assert not installed & {"numpy", "pillow", "pydantic", "rich", "torch"}
    environment.run("python", ROUND_TRIP)
    took = "import time; s = time.process_time(); import darkroom_client; "
    took += "print(time.process_time() - s)"
    # CPU time, best of three, so other load on the machine does not matter.
    assert min(float(environment.run("python", "-c", took)) for _ in range(3)) < IMPORT_SECONDS


def test_the_client_works_with_the_lowest_versions(
    distributions: Distributions, environment: Environment
) -> None:
    lowest = lowest_versions(distributions.protos) | lowest_versions(distributions.client)
    pins = [f"{name}=={version}" for name, version in lowest.items()]
    environment.install(distributions.protos.path, distributions.client.path, *pins)
    grpcio, protobuf = map(Version, environment.run("python", ROUND_TRIP).split())
    assert (grpcio, protobuf) == (lowest["grpcio"], lowest["protobuf"])


def lowest_versions(wheel: Wheel) -> dict[str, Version]:
    """Return the lowest allowed version of each dependency of the wheel."""
    lowest = {}
    for text in wheel.metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        floors = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        if floors and not requirement.marker:
            lowest[requirement.name] = floors[0]
    return lowest


def test_the_client_installs_its_extras(
    distributions: Distributions, environment: Environment
) -> None:
    client = f"{distributions.client.path}[cli,pil,numpy]"
    environment.install("-c", CONSTRAINTS, distributions.protos.path, client)
    environment.run("python", "-c", "import numpy, PIL, rich")
    environment.run("darkroom", "--help")


def test_the_demo_runs_from_the_wheels(
    distributions: Distributions, furnished: Environment
) -> None:
    wheels = (distributions.protos, distributions.client, distributions.server)
    furnished.install("--no-deps", *(wheel.path for wheel in wheels))
    where = furnished.run("python", "-c", "import darkroom_server as s; print(s.__file__)").strip()
    assert Path(where).is_relative_to(furnished.folder)
    furnished.run("python", ROOT / "examples/demo.py")
    assert (furnished.folder / "demo-output/contact-sheet.png").is_file()
