"""The lower bounds that `make test-lowest` tests."""

import importlib.metadata

from packaging.version import Version

from tools.lowest_versions import lowest_versions

QUANTIZERS = {"bitsandbytes", "gguf", "torchao"}
"""They are not in .venv: one needs a GPU, the others are for `make test-quantized`."""


def test_there_is_a_lowest_version_of_every_dependency() -> None:
    lowest = lowest_versions()

    # With versions below, the denoisers of Z-Image and HiDream take other arguments than those that
    # their families describe, so their calls would not be merged.
    assert Version(lowest["diffusers"]) >= Version("0.42")
    # Versions below do not load the demo model.
    assert Version(lowest["transformers"]) >= Version("5.6")
    assert Version(lowest["torch"]) == Version(
        importlib.metadata.version("torch").partition("+")[0]
    )
    for name, version in lowest.items():
        if name in QUANTIZERS:
            continue
        assert Version(version) <= Version(importlib.metadata.version(name)), name
