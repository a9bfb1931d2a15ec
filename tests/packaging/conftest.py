import os
import sys
from pathlib import Path

import pytest

from tests.packaging.distributions import (
    Distributions,
    Environment,
    build_distributions,
    find_distributions,
)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """What `make wheels` has just built into the folder ``BUILT_WHEELS``, or else new ones."""
    if folder := os.environ.get("BUILT_WHEELS"):
        return find_distributions(Path(folder))
    return build_distributions(tmp_path_factory.mktemp("distributions"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def furnished(tmp_path: Path) -> Environment:
    """An environment with this one's third-party packages and none of ours.

    Ours are installed as editable here, by .pth files; those are heeded in an environment's own
    folder only, not in one that is added to the path.
    """
    environment = Environment(tmp_path / "furnished")
    (here,) = (p for p in sys.path if p.startswith(sys.prefix) and p.endswith("site-packages"))
    (packages,) = environment.folder.glob("lib/python*/site-packages")
    (packages / "third_party.pth").write_text(here)
    return environment
