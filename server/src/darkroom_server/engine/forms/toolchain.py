"""What compiles a denoiser and loads the result: torch's inductor, in a process of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from darkroom_server.engine.forms.compiled import CompiledDenoiser, open_package
from darkroom_server.engine.forms.compiled_blocks import has_blocks, load_blocks
from darkroom_server.engine.forms.signature import TensorKind, Values
from darkroom_server.engine.forms.task import CompileTask

PROCESS = ("-P", "-m", "darkroom_server.engine.forms.compile_process")
"""Python's arguments for the process that compiles; -P: import nothing from the folder."""

LOWEST_PRIORITY = 19

KEPT_LINES = 3
"""Of what the process writes before it fails."""


class CompileFailed(Exception):
    """A denoiser was not compiled, or its result cannot be used; the message says why."""


class Toolchain(Protocol):
    """Compiles denoisers and loads the results."""

    def missing(self, task: CompileTask) -> str:
        """What it lacks to compile ``task`` here, in one line; "" if nothing."""

    def compile(self, task: CompileTask, file: Path) -> None:
        """Compile into ``file``, in a folder that exists; no other call does at the same time.

        No torch runs on the calling thread. The file is there only if the compile succeeded. Raises
        ``CompileFailed``.
        """

    def load(self, task: CompileTask, file: Path, denoiser: Any) -> CompiledDenoiser:
        """What was compiled into ``file``, with the weights of ``denoiser``, which it shares.

        It may ``pause``. Raises any error for a file that cannot be used.
        """

    def close(self) -> None:
        """Stop to compile; may be called from another thread."""


class Inductor:
    """torch's AOTInductor. The compile runs at the lowest priority and ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def missing(self, task: CompileTask) -> str:
        """What it lacks to compile ``task`` here, in one line; "" if nothing."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler ({compiler}); install one, or set CXX"
        if "user_managed" not in str(torch._C._aoti.AOTIModelPackageLoader.load_constants.__doc__):
            return f"torch {torch.__version__} shares no weights with compiled code; update it"
        return "" if task.gpu is None else _missing_for_cuda()

    def compile(self, task: CompileTask, file: Path) -> None:
        """Compile into ``file``. Raises ``CompileFailed``."""
        scratch = file.with_suffix(".tmp")
        try:
            # One that was killed may have left it; the caller holds the lock of ``file``.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            made = scratch / "denoiser.pt2"
            self._run(task, made, scratch)
            made.replace(file)
        except OSError as error:
            raise CompileFailed(str(error)) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def load(self, task: CompileTask, file: Path, denoiser: Any) -> CompiledDenoiser:
        """What was compiled into ``file``, with the weights of ``denoiser``, which it shares."""
        if has_blocks(file):
            return load_blocks(task.kinds, file, denoiser)
        loader = open_package(file, denoiser, for_graphs=task.rows is not None)
        metadata = loader.get_metadata()
        order = [name for name in _names(loader) if isinstance(task.kinds[name], TensorKind)]

        def run(values: Values) -> Any:
            return loader.run([values[name] for name in order])

        return CompiledDenoiser(run, int(metadata["least_rows"]), int(metadata["most_rows"]))

    def close(self) -> None:
        """Kill the process that compiles, if there is one."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _run(self, task: CompileTask, made: Path, scratch: Path) -> None:
        environment = {
            **os.environ,
            # One core at a time, and nothing of it in the user's own cache.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
        }
        gpu = () if task.gpu is None else (str(task.gpu),)
        with self._lock:
            if self._closed:
                raise CompileFailed("the engine closes")
            self._process = subprocess.Popen(
                [sys.executable, *PROCESS, str(os.getpid()), str(made), *gpu],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
        process = self._process
        try:
            _, lines = process.communicate(task.description.encode())
        finally:
            with self._lock:
                self._process = None
        if process.returncode or not made.is_file():
            last = lines.decode(errors="replace").strip().splitlines()[-KEPT_LINES:]
            raise CompileFailed(" ".join(last) or f"exit code {process.returncode}")


def _missing_for_cuda() -> str:
    """What is missing to compile for CUDA: torch's wheels have neither headers nor compilers."""
    if not (_cuda_home() / "include" / "cuda.h").is_file():
        return "there is no CUDA toolkit with cuda.h; install it, and set CUDA_HOME"
    compilers = [os.environ.get("CC", ""), "gcc", "clang"]
    if not any(each and shutil.which(each) for each in compilers):
        return "there is no C compiler (gcc, clang); install one, or set CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "there is no Python.h; install Python's development files"
    return ""


def _cuda_home() -> Path:
    """Where torch looks for the toolkit."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    found = Path(nvcc).parent.parent if nvcc else Path("/usr/local/cuda")
    return Path(named) if named else found


def _names(loader: Any) -> list[str]:
    """The names of the arguments of a package, in its order."""
    spec = pytree.treespec_loads(loader.get_call_spec()[0])
    _, named = spec.children()
    names: list[str] = []
    for name, part in zip(named.context, named.children(), strict=True):
        names += [name] if part.is_leaf() else [f"{name}.{entry}" for entry in part.context]
    return names
