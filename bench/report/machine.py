"""What was measured on: the machine, the versions, the model. No host names, no paths."""

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import psutil

from darkroom_server.core.engine_config import ModelSource

PACKAGES = ("darkroom-server", "diffusers", "torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """``memory_gib`` is the host's; ``gpu`` is empty if none is used."""

    cores: int
    cpu: str
    memory_gib: int
    gpu: str = ""

    @property
    def text(self) -> str:
        """For a page."""
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cores} cores of {self.cpu}, {self.memory_gib} GiB of memory{gpu}"

    @property
    def slug(self) -> str:
        """For a file name: "2-core-amd-epyc"."""
        words = f"{self.cores} core {self.gpu or self.cpu}".lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def this_machine(gpu: str = "") -> MachineInfo:
    """The machine that runs this."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return MachineInfo(
        cores=len(os.sched_getaffinity(0)),
        cpu=found[1].strip() if found else platform.machine(),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        gpu=gpu,
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that generate the images."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def model_source(location: str | None) -> ModelSource:
    """The model in ``location``; None is the demo model of the server."""
    if location is None:
        location = str(files("darkroom_server") / "demo_model")
    return ModelSource(id="demo", location=location)
