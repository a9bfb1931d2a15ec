"""Count which of our functions run, and which calls cross from one of our files to another."""

import dis
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from pathlib import Path
from types import CodeType, FrameType
from typing import Self

SUSPENDABLE = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


@dataclass(frozen=True, slots=True, order=True)
class Function:
    """One function of ours: its file, relative to the package's folder, and its qualified name."""

    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


@dataclass
class Way:
    """What one package did for one request."""

    functions: Counter[Function] = field(default_factory=Counter)
    crossings: Counter[tuple[Function, Function]] = field(default_factory=Counter)

    @property
    def files(self) -> list[str]:
        """The files of the functions that ran, sorted."""
        return sorted({function.file for function in self.functions})


BACKGROUND_THREADS = {"metrics"}
"""Threads that work at fixed times, whatever the requests are: the metrics port polls."""


class Tracer:
    """Records the calls of the thread that records, and of all threads that start in its block.

    ``packages`` maps a name to the folder whose files are ours. Calls are recorded inside
    ``recording()`` only.
    """

    def __init__(self, packages: dict[str, Path]) -> None:
        self.ways = {name: Way() for name in packages}
        self._roots = [(f"{folder}/", name) for name, folder in packages.items()]
        self._recording = False

    def __enter__(self) -> Self:
        # A thread takes over the profile function as it starts, and never later.
        threading.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens during the block, in this thread and in those of the outer block."""
        sys.setprofile(self._on_event)
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: object) -> None:
        if not self._recording or event != "call" or _resumes(frame):
            return
        if threading.current_thread().name in BACKGROUND_THREADS:
            return
        found = self._find(frame.f_code)
        if found is None:
            return
        package, callee = found
        way = self.ways[package]
        way.functions[callee] += 1
        calling = frame.f_back and self._find(frame.f_back.f_code)
        if calling and calling[0] == package and calling[1].file != callee.file:
            way.crossings[calling[1], callee] += 1

    def _find(self, code: CodeType) -> tuple[str, Function] | None:
        for root, package in self._roots:
            if code.co_filename.startswith(root):
                return package, Function(code.co_filename.removeprefix(root), code.co_qualname)
        return None


def _resumes(frame: FrameType) -> bool:
    """Whether the call continues a suspended generator or coroutine, rather than starting one."""
    return bool(frame.f_code.co_flags & SUSPENDABLE) and frame.f_lasti > _start_of(frame.f_code)


@cache
def _start_of(code: CodeType) -> int:
    """The offset of the instruction at which the body of a generator or coroutine starts."""
    return next(each.offset for each in dis.get_instructions(code) if each.opname == "RESUME")
