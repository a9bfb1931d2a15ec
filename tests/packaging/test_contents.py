"""The contents of the wheels."""

from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

from tests.packaging.distributions import (
    PACKAGES,
    ROOT,
    Distributions,
    Wheel,
    find_distributions,
)

MOST_BYTES = 60_000_000


@pytest.fixture(params=["protos", "client", "server"])
def wheel(request: pytest.FixtureRequest, distributions: Distributions) -> Wheel:
    found = getattr(distributions, request.param)
    assert isinstance(found, Wheel)
    return found


def test_every_wheel_is_typed_and_licensed(wheel: Wheel) -> None:
    assert any(name.endswith("/py.typed") for name in wheel.names)
    assert wheel.info("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.metadata["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize("package", ["protos", "client", "server"])
def test_a_wheel_holds_every_source_file(package: str, distributions: Distributions) -> None:
    source = ROOT / package / "src"
    expected = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wheel: Wheel = getattr(distributions, package)
    packed = {name for name in wheel.names if ".dist-info/" not in name}
    assert {name for name in packed if not name.endswith(".proto")} == expected


def test_the_three_share_one_version(distributions: Distributions) -> None:
    version = distributions.protos.metadata["Version"]
    for wheel in (distributions.client, distributions.server):
        assert wheel.metadata["Version"] == version
        assert f"darkroom-protos=={version}" in wheel.metadata.get_all("Requires-Dist", [])


def test_the_protos_wheel_holds_the_protos(distributions: Distributions) -> None:
    sources = sorted((ROOT / "protos/darkroom").rglob("*.proto"))
    assert sources
    for source in sources:
        name = str(source.relative_to(ROOT / "protos"))
        assert distributions.protos.read(name) == source.read_bytes()


def test_the_server_wheel_holds_the_demo_model(distributions: Distributions) -> None:
    names = distributions.server.names
    (index,) = (name for name in names if name.endswith("/model_index.json"))
    folder = index.removesuffix("model_index.json")
    for part in ("text_encoder", "unet", "vae"):
        assert any(
            name.startswith(f"{folder}{part}/") and name.endswith(".safetensors") for name in names
        )


def test_the_server_wheel_is_small(distributions: Distributions) -> None:
    assert distributions.server.path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("package", "command"), [("client", "darkroom"), ("server", "darkroom-server")]
)
def test_a_wheel_installs_its_command(
    package: str, command: str, distributions: Distributions
) -> None:
    wheel: Wheel = getattr(distributions, package)
    assert f"\n{command} = " in wheel.info("entry_points.txt")


def test_the_client_needs_nothing_heavy(distributions: Distributions) -> None:
    requirements = map(Requirement, distributions.client.metadata.get_all("Requires-Dist", []))
    assert {r.name for r in requirements if not r.marker or "extra" not in str(r.marker)} == {
        "darkroom-protos",
        "googleapis-common-protos",
        "grpcio",
        "grpcio-health-checking",
        "grpcio-status",
        "protobuf",
    }


@pytest.mark.parametrize("package", ["protos", "client", "server"])
def test_the_readme_of_a_package_renders(package: str, distributions: Distributions) -> None:
    wheel: Wheel = getattr(distributions, package)
    metadata = wheel.metadata
    page = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert page.strip() == (ROOT / package / "README.md").read_text().strip()
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    assert tokens[0].tag == "h1"
    if package == "client":
        assert any(token.type == "table_open" for token in tokens)
    # A package index shows the page alone, so relative links would break.
    inner = [child for token in tokens for child in token.children or ()]
    links = [str(child.attrs["href"]) for child in inner if child.tag == "a" and child.attrs]
    assert all("://" in link for link in links), links


def test_a_folder_without_a_package_s_wheel_is_not_taken(tmp_path: Path) -> None:
    names = [f"darkroom_{package}-1.0-py3-none-any.whl" for package in PACKAGES]
    for name in names[:2]:
        (tmp_path / name).touch()
    with pytest.raises(AssertionError, match="darkroom_client"):
        find_distributions(tmp_path)
    (tmp_path / names[2]).touch()
    assert find_distributions(tmp_path).server.path.name == names[2]
