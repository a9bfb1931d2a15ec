"""Brings the compiled denoisers of an engine's models: from the disk, or from the toolchain."""

import fcntl
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import structlog

from darkroom_server.core.engine_config import Compile
from darkroom_server.engine.catalogue.slices import SlicedWork
from darkroom_server.engine.failures import is_fatal, is_out_of_memory, one_line
from darkroom_server.engine.families.base import Model
from darkroom_server.engine.forms.compiled import CompiledDenoiser
from darkroom_server.engine.forms.denoiser_forms import DenoiserForms, WrongOutput
from darkroom_server.engine.forms.graphs import GraphedDenoiser, record_compiled
from darkroom_server.engine.forms.task import CompileTask
from darkroom_server.engine.forms.toolchain import CompileFailed, Toolchain

log = structlog.get_logger(__name__)

TRIED_ROWS = (2, 3, 5)
"""Of the calls that compare a compiled denoiser with the eager one."""


LOCK_SECONDS = 1.0
"""Between looks at whether another engine still compiles."""

FAILED_RUN = "API call failed"
"""In what compiled code raises for any error of torch, which says nothing about its file."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The denoiser of ``model`` was compiled as ``task`` says."""

    model: str
    task: CompileTask


class Compiler:
    """Compiles into ``folder``, and replaces denoisers by what was compiled.

    A compiled denoiser is first compared with the eager one. One that fails to compile, to load or
    to compute the same leaves the eager one, with a line in the log. A denoiser that runs as graphs
    has further ones, of what was compiled, for a few numbers of rows.

    The compiles of ``Compile.BACKGROUND`` wait until ``start``, and run on a thread of their own,
    one after the other. All else is used from the loop's thread only.
    """

    def __init__(self, folder: str | None, toolchain: Toolchain) -> None:
        self._folder = Path(folder or "")
        self._toolchain = toolchain
        self._models: dict[str, Model] = {}
        self._trials: deque[tuple[str, Generator[None, None, bool]]] = deque()
        self._to_compile: queue.SimpleQueue[tuple[str, CompileTask] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reported_missing = False
        self._closing = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether ``work`` has something to do."""
        return bool(self._trials)

    def prepare(self, model: Model, *, beside_jobs: bool = False) -> None:
        """Use the compiled denoiser of a new model, if it is on the disk; else compile it.

        As ``DenoiserForms.when`` says: now, later, or not at all. ``beside_jobs``: nothing is done
        now, and ``work`` tries what is on the disk.
        """
        forms = model.forms
        if forms is None or (forms.graph_rows and forms.other is None):
            # Without graphs, which the log has reported, the batches of a GPU stay eager.
            return
        for task in _usable_tasks(forms):
            self._prepare(model, forms, task, beside_jobs=beside_jobs)

    def _prepare(
        self, model: Model, forms: DenoiserForms, task: CompileTask, *, beside_jobs: bool
    ) -> None:
        id, file = model.info.id, self._file(task)
        used = False
        if beside_jobs:
            if used := file.is_file():
                self._trials.append((id, self._trial(model, forms, task)))
        else:
            if forms.when is Compile.BLOCKING and not file.is_file() and self._can_compile(task):
                self._compile(id, task)
            if file.is_file():
                used = _run_whole(self._trial(model, forms, task))
        later = (Compile.BACKGROUND, Compile.BLOCKING) if beside_jobs else (Compile.BACKGROUND,)
        if not used and forms.when in later and self._can_compile(task):
            self._models[id] = model
            self._to_compile.put((id, task))

    def start(self, receive: Callable[[Compiled], None]) -> None:
        """Start to compile; ``receive`` gets what was compiled, on another thread."""
        self._thread = threading.Thread(
            target=self._run, args=[receive], name="compile", daemon=True
        )
        self._thread.start()

    def add(self, compiled: Compiled) -> None:
        """Let ``work`` try what was compiled."""
        model = self._models.get(compiled.model)
        # The one of an unloaded model's id may be another.
        if (
            model is not None
            and model.forms is not None
            and compiled.task in _usable_tasks(model.forms)
        ):
            trial = self._trial(model, model.forms, compiled.task)
            self._trials.append((compiled.model, trial))

    def forget(self, model_id: str) -> None:
        """Do nothing more for a model that is unloaded."""
        self._models.pop(model_id, None)
        self._trials = deque(each for each in self._trials if each[0] != model_id)

    def work(self) -> str:
        """Do a part of a trial that takes no longer than a batch.

        Returns the id of the model whose denoiser it replaced, "" for none.
        """
        if not self._trials:
            return ""
        id, trial = self._trials[0]
        try:
            next(trial)
        except StopIteration as end:
            self._trials.popleft()
            return id if end.value else ""
        return ""

    def close(self) -> None:
        """Stop to compile."""
        self._closing.set()
        self._toolchain.close()
        self._to_compile.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, receive: Callable[[Compiled], None]) -> None:
        while (next_one := self._to_compile.get()) is not None:
            id, task = next_one
            if self._compile(id, task):
                receive(Compiled(id, task))

    def _compile(self, id: str, task: CompileTask) -> bool:
        """Compile on the calling thread; returns whether the result is there."""
        file = self._file(task)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".lock").open("w") as lock:
                if not self._acquire(lock):
                    return False
                if not file.is_file():
                    log.info("denoiser is being compiled", model=id, **_rows_of(task))
                    self._toolchain.compile(task, file)
        except (CompileFailed, OSError) as error:
            if not self._closing.is_set():
                log.warning("denoiser stays eager", model=id, why=one_line(error), **_rows_of(task))
            return False
        return True

    def _acquire(self, lock: IO[str]) -> bool:
        """Wait for other engines and servers that compile the same; False if this one closes."""
        while not self._closing.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._closing.wait(LOCK_SECONDS)
            else:
                return True
        return False

    def _trial(
        self, model: Model, forms: DenoiserForms, task: CompileTask
    ) -> Generator[None, None, bool]:
        """Load and compare a compiled denoiser in parts; returns whether it is used from now on."""
        file = self._file(task)
        try:
            load = SlicedWork(lambda: self._toolchain.load(task, file, forms.denoiser))
            while not load.run():
                yield
            compiled: CompiledDenoiser = load.result
            yield from _compare(compiled, forms, TRIED_ROWS if task.rows is None else [task.rows])
            if task.rows is None:
                forms.other = compiled
            else:
                yield
                record_compiled(model, forms, task.rows, compiled)
        except Exception as error:
            if is_fatal(error):
                raise
            why = one_line(error)
            log.warning("denoiser stays eager", model=model.info.id, why=why, **_rows_of(task))
            if not is_out_of_memory(error) and FAILED_RUN not in str(error):
                file.unlink(missing_ok=True)
            return False
        model.info = model.info.with_runtime(denoiser=model.info.runtime.denoiser.compiled)
        log.info(
            "denoiser is compiled",
            model=model.info.id,
            most_rows=compiled.most_rows,
            by_blocks=compiled.by_blocks,
        )
        return True

    def _can_compile(self, task: CompileTask) -> bool:
        missing = self._toolchain.missing(task)
        if missing and not self._reported_missing:
            self._reported_missing = True
            log.warning("denoisers stay eager", why=missing)
        return not missing

    def _file(self, task: CompileTask) -> Path:
        return self._folder / f"{task.digest}.pt2"


def _usable_tasks(forms: DenoiserForms) -> list[CompileTask]:
    """Those for which there is a graph, or which need none."""
    graphed = forms.other
    rows = graphed.recorded_rows if isinstance(graphed, GraphedDenoiser) else []
    return [task for task in forms.tasks if task.rows is None or task.rows in rows]


def _run_whole(trial: Generator[None, None, bool]) -> bool:
    """All parts of ``trial``; returns what it returns."""
    while True:
        try:
            next(trial)
        except StopIteration as end:
            return bool(end.value)


def _rows_of(task: CompileTask) -> dict[str, int]:
    """What a line of the log says of ``task``, besides its model."""
    return {} if task.rows is None else {"rows": task.rows}


def _compare(
    compiled: CompiledDenoiser, forms: DenoiserForms, tried_rows: Sequence[int]
) -> Generator[None]:
    """Compare the two forms in calls of ``tried_rows``. Raises ``WrongOutput`` if they differ."""
    for rows in tried_rows:
        if not compiled.takes(rows, exact=False):
            continue
        yield
        arguments = forms.example(rows)
        expected = forms.denoiser(**arguments)[0]
        yield
        values = forms.signature.arranged(arguments)
        if values is None:
            raise WrongOutput("it does not take the arguments of a batch")
        forms.check(compiled(values)[0], expected)
