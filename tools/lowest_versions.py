"""Prints pip constraints with the lowest version of each dependency; `make test-lowest` uses them.

torch is the exception: its version is that of ``constraints.txt``, the one that the tests run with.
"""

from packaging.version import Version

from tools.declared_requirements import ROOT, declared_requirements

PACKAGES = ("protos", "client", "server")
PINNED = "torch"


def lowest_versions() -> dict[str, str]:
    """The lowest version of each dependency, extras included; the highest of several bounds.

    Raises ``ValueError`` for a dependency without a lower bound.
    """
    lowest: dict[str, Version] = {}
    for requirement in declared_requirements(PACKAGES):
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if not bounds:
            raise ValueError(f"{requirement} has no lower bound")
        bound = Version(bounds[0])
        lowest[requirement.name] = max(bound, lowest.get(requirement.name, bound))
    return {**{name: str(version) for name, version in lowest.items()}, PINNED: _pinned()}


def _pinned() -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{PINNED}==")).partition("==")[2]


if __name__ == "__main__":
    for name, version in sorted(lowest_versions().items()):
        print(f"{name}=={version}")
