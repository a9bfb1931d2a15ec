"""The environments of the peers have what this repository's code in them imports."""

import json
import re
import subprocess
import sys

import pytest

from bench.peers.process import environment_of
from bench.peers.registry import PEERS
from bench.report.results import ROOT

REQUIREMENTS = ROOT / "bench" / "peers" / "requirements"

PIPELINE = "bench.peers.servers.sd_pipeline"
"""What each of the other servers calls."""

IMPORT = """
import importlib, json, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

module, listed = sys.argv[1], set(json.loads(sys.argv[2]))
canonical = lambda name: name.lower().replace("_", "-").replace(".", "-")
absent = {
    package
    for package, brought_by in packages_distributions().items()
    if not listed & {canonical(name) for name in brought_by}
    and not package.startswith("darkroom")  # From the sources.
}

class Listed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path = [Listed if finder is PathFinder else finder for finder in sys.meta_path]
importlib.import_module(module)
print(len(absent))
"""


def listed_for_all() -> set[str]:
    """The packages that are in the environment of each of the other servers."""
    found = [
        {
            re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
            for line in (REQUIREMENTS / f"{environment}.txt").read_text().splitlines()
            if "==" in line
        }
        for environment in {peer.environment for peer in PEERS.values()} - {".venv"}
    ]
    assert len(found) >= 4
    return set.intersection(*found)


def imported(packages: set[str]) -> subprocess.CompletedProcess[str]:
    """Import the pipeline where only ``packages`` are installed."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT, PIPELINE, json.dumps(sorted(packages))],
        cwd=ROOT,
        env=environment_of(PEERS["grpc"]),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("missing", ["", "greenlet"], ids=["all", "one is missing"])
def test_the_pipeline_of_the_peers_needs_no_package_that_is_not_installed(missing: str) -> None:
    packages = listed_for_all()
    assert {"torch", "diffusers", "greenlet"} <= packages
    found = imported(packages - {missing})
    if missing:
        assert f"No module named '{missing}'" in found.stderr
        return
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 10, "others of this environment are hidden"
