"""The process that holds the models which Triton has loaded.

A model of Triton's Python backend is a process of its own, and with a pipeline in it each load
would import torch, for seconds. Here that process only passes on what Triton asks for (see
``triton_model``), and one process holds the pipelines: in Triton's favour.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection, Listener
from threading import Thread
from typing import Any, Protocol, Self


class Models(Protocol):
    """What the process does for Triton's models."""

    def load(self, name: str) -> None:
        """Load a model."""

    def unload(self, name: str) -> None:
        """Forget it."""

    def generate(self, name: str, rows: Sequence[str]) -> list[bytes]:
        """The files of a batch, whose rows are in JSON."""


class Device:
    """Answers the models of Triton, each on a connection of its own, while it is entered."""

    def __init__(self, models: Models, path: str) -> None:
        self._models = models
        self._path = path
        self._listener = Listener(path, family="AF_UNIX")
        self._server = Thread(target=self._serve, name="device")
        self._closing = False
        # One thread calls the model: OpenMP keeps a pool for each.
        self._generating, self._loading = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the thread that generates."""
        self._generating.submit(work).result()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        # It waits for the next connection.
        Client(self._path, family="AF_UNIX").close()
        self._server.join()
        for threads in (self._generating, self._loading):
            threads.shutdown()

    def _serve(self) -> None:
        with self._listener as listener:
            while True:
                connection: Connection = listener.accept()
                if self._closing:
                    connection.close()
                    return
                Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    command, arguments = connection.recv()
                except EOFError:
                    return
                try:
                    answer = self._run(command, arguments)
                except Exception as error:  # noqa: BLE001 - the caller raises it.
                    answer = error
                connection.send(answer)

    def _run(self, command: str, arguments: tuple[Any, ...]) -> Any:
        models = self._models
        commands: dict[str, tuple[ThreadPoolExecutor, Callable[..., Any]]] = {
            "load": (self._loading, models.load),
            "unload": (self._loading, models.unload),
            "generate": (self._generating, models.generate),
        }
        thread, run = commands[command]
        return thread.submit(run, *arguments).result()


class DeviceClient:
    """One connection to the ``Device``."""

    def __init__(self, path: str) -> None:
        self._connection: Connection = Client(path, family="AF_UNIX")

    def __call__(self, command: str, *arguments: Any) -> Any:
        """What the device answers; raises its errors."""
        self._connection.send((command, arguments))
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
