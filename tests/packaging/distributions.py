"""The built distributions, and empty environments to install them into."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from functools import partial
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Wheel:
    path: Path

    @property
    def names(self) -> set[str]:
        with ZipFile(self.path) as archive:
            return set(archive.namelist())

    def read(self, name: str) -> bytes:
        with ZipFile(self.path) as archive:
            return archive.read(name)

    def info(self, name: str) -> str:
        """Return the text of a file in the wheel's .dist-info folder."""
        (found,) = (n for n in self.names if n.endswith(f".dist-info/{name}"))
        return self.read(found).decode()

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(self.info("METADATA"))


@dataclass(frozen=True)
class Distributions:
    protos: Wheel
    client: Wheel
    server: Wheel


PACKAGES = ("protos", "client", "server")


def find_distributions(folder: Path) -> Distributions:
    """The wheels in ``folder``, which has one of each package."""
    found = [list(folder.glob(f"darkroom_{package}-*.whl")) for package in PACKAGES]
    assert [len(wheels) for wheels in found] == [1, 1, 1], f"{folder} has {found}"
    return Distributions(*(Wheel(path) for (path,) in found))


def build_distributions(folder: Path) -> Distributions:
    """Build each package's source distribution, and its wheel from it."""
    with ThreadPoolExecutor() as pool:
        return Distributions(*pool.map(partial(_build, folder), PACKAGES))


def _build(folder: Path, package: str) -> Wheel:
    output = folder / package
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT / package)
    (path,) = output.glob("*.whl")
    return Wheel(path)


class Environment:
    """An empty virtual environment, without pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)

    def pip(self, *arguments: str | Path) -> str:
        """Run this process's pip on the environment and return its output."""
        return run(sys.executable, "-m", "pip", "--python", self._program("python"), *arguments)

    def install(self, *arguments: str | Path) -> None:
        self.pip("install", "--quiet", *arguments)

    def run(self, program: str, *arguments: str | Path) -> str:
        return run(self._program(program), *arguments, folder=self.folder)

    def _program(self, name: str) -> Path:
        return self.folder / "bin" / name


def run(*command: str | Path, folder: Path = Path("/")) -> str:
    """Run a command isolated from this checkout; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DARKROOM"))}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            # Timeout. Unlike SIGKILL, SIGTERM lets a program stop its children.
            process.send_signal(signal.SIGINT)
            raise
    assert process.returncode == 0, f"{command} failed:\n{output}{errors}"
    return output
