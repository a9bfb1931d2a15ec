"""The lower bounds that `make test-lowest` tests."""

import importlib.metadata

from packaging.version import Version

from tools.lowest_versions import lowest_versions


def test_there_is_a_lowest_version_of_every_dependency() -> None:
    lowest = lowest_versions()

    # Below it, no diffusers loads the demo model and guards against code in a model folder.
    assert Version(lowest["diffusers"]) >= Version("0.38")
    assert Version(lowest["torch"]) == Version(
        importlib.metadata.version("torch").partition("+")[0]
    )
    for name, version in lowest.items():
        assert Version(version) <= Version(importlib.metadata.version(name)), name
