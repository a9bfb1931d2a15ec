"""What the packages declare to need. Prints the container's needs, which `make lock` resolves."""

import tomllib
from collections.abc import Container, Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = "darkroom-"
IMAGE_PACKAGES = ("protos", "server")
IMAGE_EXTRAS = ("fleet", "http", "prompt-weights")


def declared_requirements(
    packages: Sequence[str], *, extras: Container[str] | None = None
) -> list[Requirement]:
    """What ``packages`` (folders of this repository) declare to need, except each other.

    ``extras`` are those of their extras that count, None for all.
    """
    texts: list[str] = []
    for package in packages:
        project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
        texts += project["dependencies"]
        for extra, needs in project.get("optional-dependencies", {}).items():
            if extras is None or extra in extras:
                texts += needs
    requirements = [Requirement(text) for text in texts]
    return [each for each in requirements if not each.name.startswith(OURS)]


if __name__ == "__main__":
    for requirement in declared_requirements(IMAGE_PACKAGES, extras=IMAGE_EXTRAS):
        print(requirement)
