"""Decodes pictures in worker processes: a picture that kills its worker costs its own request."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from darkroom_server.core.errors import (
    Failure,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    Reason,
    Violation,
)
from darkroom_server.uploads.failure import DecodeFailure
from darkroom_server.uploads.fit import Bounds

log = structlog.get_logger(__name__)

START_SECONDS = 60.0
"""For a worker to import what it needs, on a machine that is busy."""

BYTES_PER_PIXEL = 22
"""Of the most expensive picture, measured: an animated WebP with transparency takes 21."""

WORKER_BYTES = 128 * 1024**2
"""What a worker needs besides the pixels."""

MAX_WAITING_BYTES = 128 * 1024**2
"""Files that wait to be decoded, of one owner half of that; a file alone may always wait."""

RETRY_SECONDS = 1.0

EXIT_SECONDS = 1.0
"""For a worker that closed its pipe to exit, so that its exit code is its own."""

KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a worker that no picture explains: the kernel was out of memory, or a person."""

ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT")
"""Variables that a worker gets; the others may be secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What becomes of a picture.

    ``kind`` "cover": it is scaled to cover ``width`` × ``height``, of which one or both may follow
    from the picture and ``bounds``, and cropped in the centre. "within": it keeps its size, scaled
    down if a side is above ``bounds.most``. "check": it is decoded, and no pixels come back.
    ``gray``: one channel of 0 and 255. ``expected``: the size that the picture must have itself.
    """

    kind: str
    bounds: Bounds
    width: int | None = None
    height: int | None = None
    gray: bool = False
    expected: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A decoded picture; ``source``: its own width and height, as it is seen."""

    source: tuple[int, int]
    width: int
    height: int
    channels: int
    pixels: bytes


class _WorkerDied(Exception):
    """The worker ended, or answered nonsense."""


class DecoderPool:
    """Decodes at most ``workers`` pictures at once, in as many processes, and less of one owner.

    ``max_pixels`` bounds a picture, ``timeout`` the seconds that one takes, ``bytes_per_pixel`` the
    memory of a worker, for each of ``max_pixels``. Workers start when they are needed.
    ``on_failure`` receives each failure. Belongs to one event loop.
    """

    def __init__(
        self,
        *,
        workers: int,
        max_pixels: int,
        timeout: float,
        bytes_per_pixel: int = BYTES_PER_PIXEL,
        on_failure: Callable[[DecodeFailure], None] = lambda _: None,
    ) -> None:
        self._max_pixels = max_pixels
        self._timeout = timeout
        self._memory = max_pixels * bytes_per_pixel + WORKER_BYTES
        self._on_failure = on_failure
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ending: set[asyncio.Task[int]] = set()
        self._places = asyncio.Semaphore(workers)
        self._owner_places = max(1, workers - 1)
        self._owners: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self._owner_places)
        )
        self._waiting: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.pid for worker in (*self._idle, *self._busy)]

    @property
    def busy(self) -> int:
        """The number of workers that decode a picture now."""
        return len(self._busy)

    async def decode(self, owner: str, field: str, data: bytes, fit: Fit) -> Decoded:
        """Decode the file ``data``, which ``field`` of a request of ``owner`` holds.

        Raises ``InvalidRequest`` if it cannot be used, ``QueueFull`` if too many wait, and
        ``GenerationFailed`` if the worker was killed or cannot be started.
        """
        async with self._place(owner, len(data)), self._worker() as worker:
            try:
                async with asyncio.timeout(self._timeout):
                    reply, pixels = await worker.decode(data, fit)
            except TimeoutError:
                raise self._failed(
                    DecodeFailure.TOO_SLOW, field, f"takes more than {self._timeout:g} s to decode"
                ) from None
            except _WorkerDied:
                code = await worker.exit_code()
                log.warning("image worker died", exit_code=code)
                error = self._failed(DecodeFailure.WORKER_DIED, field, "cannot be decoded")
                if code in KILLED_FROM_OUTSIDE:
                    raise _internal("the process that decodes images was killed") from None
                raise error from None
        if (failure := reply.get("failure")) is not None:
            found = DecodeFailure(failure)
            raise self._failed(found, field, self._says(found, reply.get("source"), fit))
        return Decoded(
            source=tuple(reply["source"]),
            width=reply["width"],
            height=reply["height"],
            channels=reply["channels"],
            pixels=pixels,
        )

    async def close(self) -> None:
        """End the workers."""
        for worker in (*self._idle, *self._busy):
            await worker.kill()
        self._idle.clear()
        if self._ending:
            await asyncio.wait(self._ending)

    @asynccontextmanager
    async def _place(self, owner: str, size: int) -> AsyncIterator[None]:
        """Wait for the owner's turn, and then for a free worker."""
        waiting, mine = self._waiting.total(), self._waiting[owner]
        if (waiting and waiting + size > MAX_WAITING_BYTES) or (
            mine and mine + size > MAX_WAITING_BYTES // 2
        ):
            raise QueueFull("too many images wait to be decoded", RETRY_SECONDS)
        self._waiting[owner] += size
        self._calls[owner] += 1
        try:
            async with self._owners[owner], self._places:
                yield
        finally:
            self._waiting[owner] -= size
            self._calls[owner] -= 1
            if not self._calls[owner]:
                del self._waiting[owner], self._calls[owner], self._owners[owner]

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator["_Worker"]:
        """A worker of one's own; it is ended unless the block ends well."""
        self._idle = [worker for worker in self._idle if worker.alive]
        worker = self._idle.pop() if self._idle else await self._start()
        self._busy.add(worker)
        try:
            yield worker
        except BaseException:
            ending = asyncio.create_task(worker.kill())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise
        else:
            self._idle.append(worker)
        finally:
            self._busy.discard(worker)

    async def _start(self) -> "_Worker":
        try:
            return await _Worker.start(self._memory, self._max_pixels)
        except (OSError, TimeoutError, _WorkerDied) as error:
            log.error("cannot start an image worker", error=repr(error))
            raise _internal("the process that decodes images cannot start") from error

    def _failed(self, failure: DecodeFailure, field: str, says: str) -> InvalidRequest:
        self._on_failure(failure)
        return InvalidRequest([Violation(field, says)])

    def _says(self, failure: DecodeFailure, source: list[int] | None, fit: Fit) -> str:
        width, height = source or (0, 0)
        match failure:
            case DecodeFailure.NOT_A_PICTURE:
                return "is not a PNG, JPEG or WebP picture"
            case DecodeFailure.TOO_MANY_PIXELS:
                most = self._max_pixels / 1e6
                return f"has {width}×{height} pixels, and at most {most:g} million are decoded"
            case DecodeFailure.WRONG_SIZE if fit.expected is not None:
                wanted = f"{fit.expected[0]}×{fit.expected[1]}"
                return f"must have the size of image, {wanted}, and has {width}×{height}"
            case DecodeFailure.TOO_MUCH_MEMORY:
                return "takes too much memory to decode"
        return "is damaged: it cannot be decoded"


class _Worker:
    """One worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker needs its pipes")
        self.pid = process.pid
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @property
    def alive(self) -> bool:
        """The process has not ended, as far as that is known."""
        return self._process.returncode is None

    @classmethod
    async def start(cls, max_memory: int, max_pixels: int) -> "_Worker":
        """Start a process, and wait until it is ready.

        Raises ``OSError``, ``TimeoutError`` or ``_WorkerDied``.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "darkroom_server.uploads.worker",
            str(max_memory),
            str(max_pixels),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                await worker._line()
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def decode(self, data: bytes, fit: Fit) -> tuple[dict[str, Any], bytes]:
        """The worker's reply and the pixels; raises ``_WorkerDied``."""
        request = {
            "size": len(data),
            "kind": fit.kind,
            "width": fit.width,
            "height": fit.height,
            "least": fit.bounds.least,
            "most": fit.bounds.most,
            "multiple": fit.bounds.multiple,
            "sizes": fit.bounds.sizes,
            "gray": fit.gray,
            "expected": fit.expected,
        }
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.write(data)
            await self._stdin.drain()
            reply = json.loads(await self._line())
            if reply.get("failure") is not None:
                return {**reply, "failure": DecodeFailure(reply["failure"])}, b""
            return reply, await self._stdout.readexactly(_pixel_bytes(reply, fit))
        except (OSError, EOFError):
            raise _WorkerDied from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _WorkerDied from None  # A picture has taken it over: it is not to be trusted.

    async def kill(self) -> int:
        """End the process; its exit code."""
        self._stdin.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()

    async def exit_code(self) -> int:
        """The exit code of a process that closed its pipe, or that is ended now."""
        with suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                return await self._process.wait()
        return await self.kill()

    async def _line(self) -> bytes:
        try:
            return await self._stdout.readuntil(b"\n")
        except (OSError, EOFError, asyncio.LimitOverrunError):
            raise _WorkerDied from None


def _pixel_bytes(reply: dict[str, Any], fit: Fit) -> int:
    """The bytes that follow ``reply``; raises ``ValueError`` if it cannot be true."""
    width, height, channels = int(reply["width"]), int(reply["height"]), int(reply["channels"])
    source = [int(side) for side in reply["source"]]
    most = 0 if fit.kind == "check" else fit.bounds.most
    if len(source) != 2 or not (0 <= width <= most and 0 <= height <= most):
        raise ValueError
    if channels not in ((0,) if fit.kind == "check" else (1,) if fit.gray else (3,)):
        raise ValueError
    return width * height * channels


def _internal(message: str) -> GenerationFailed:
    return GenerationFailed(Failure(Reason.INTERNAL, message))
