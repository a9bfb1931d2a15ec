"""What the packages declare to need. Prints the server's needs, which `make lock` resolves."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = "darkroom-"


def declared_requirements(packages: Sequence[str], *, extras: bool) -> list[Requirement]:
    """What ``packages`` (folders of this repository) declare to need, except each other."""
    texts: list[str] = []
    for package in packages:
        project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
        texts += project["dependencies"]
        for extra in project.get("optional-dependencies", {}).values() if extras else ():
            texts += extra
    requirements = [Requirement(text) for text in texts]
    return [each for each in requirements if not each.name.startswith(OURS)]


if __name__ == "__main__":
    for requirement in declared_requirements(("protos", "server"), extras=False):
        print(requirement)
