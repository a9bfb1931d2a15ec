"""A pipeline's run in a greenlet, which can be suspended in the middle of a Python call.

The run is suspended from inside, by ``suspend``, and resumed or ended from outside. Everything
happens on one thread: greenlets switch on it, threads would not.
"""

import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import torch


class SampleEnded(BaseException):
    """Raised in a suspended run that must end; not an ``Exception``, so that no one handles it."""


class SwallowedEnd(RuntimeError):
    """A pipeline caught ``SampleEnded`` and went on."""


ThreadState = tuple[bool, bool, bool, torch.dtype]
"""Whether torch records gradients, infers, and autocasts, and autocast's dtype.

torch keeps it for a thread, which greenlets of the thread share. Each side of a switch has its own:
a pipeline that enters ``no_grad`` or autocast must not change what other pipelines, or the loop,
compute.
"""


def thread_state(device_type: str) -> ThreadState:
    """The state of this thread."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
    )


def restore(state: ThreadState, device_type: str) -> None:
    """Make ``state`` that of this thread again.

    Raises ``RuntimeError`` if the inference mode changed: its guard nests, so it cannot be set.
    """
    if thread_state(device_type) == state:
        return
    grad, inference, autocast, autocast_dtype = state
    torch.set_grad_enabled(grad)
    torch.set_autocast_enabled(device_type, autocast)
    torch.set_autocast_dtype(device_type, autocast_dtype)
    if torch.is_inference_mode_enabled() != inference:
        raise RuntimeError("a pipeline left torch's inference mode while it was suspended")


class _Run(greenlet.greenlet):
    """The greenlet of a ``Coroutine``: the thread may have others."""


def is_suspendable() -> bool:
    """Whether this code runs in a ``Coroutine``."""
    return isinstance(greenlet.getcurrent(), _Run)


def suspend(call: Any, device_type: str) -> Any:
    """Suspend the run that this code is part of; returns what it is resumed with.

    ``call`` is what its ``Coroutine.resume`` returns. Raises ``SampleEnded`` if the run must end.
    """
    # No variable may lead to this run's own greenlet: a frame on the C stack that holds it is a
    # cycle that the garbage collector cannot see, and would keep every tensor of the run.
    hub = greenlet.getcurrent().parent
    assert hub is not None, "only a Coroutine can be suspended"
    state = thread_state(device_type)
    try:
        return hub.switch(call)
    finally:
        restore(state, device_type)


class Coroutine:
    """One run of ``run``, which may call ``suspend``.

    ``device_type`` is the kind of the device it computes on. Neither ``run`` nor what it reaches
    may hold this object.
    """

    def __init__(self, run: Callable[[], Any], device_type: str) -> None:
        self._greenlet = _Run(run)
        # Otherwise the values that structlog has bound would be missing in the run.
        self._greenlet.gr_context = contextvars.copy_context()
        self._device_type = device_type

    @property
    def ended(self) -> bool:
        """True once ``run`` has returned or raised."""
        return bool(self._greenlet.dead)

    def start(self) -> Any:
        """Run to the first ``suspend``, and return its call; or to the end, and return the result.

        Raises what ``run`` raises.
        """
        return self._switch()

    def resume(self, value: Any) -> Any:
        """Let ``suspend`` return ``value``; returns and raises as ``start`` does."""
        return self._switch(value)

    def held_bytes(self) -> int:
        """The bytes of the tensors that the suspended run holds in its variables."""
        sizes: dict[int, int] = {}
        frame = self._greenlet.gr_frame
        while frame is not None:
            for value in frame.f_locals.values():
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
            frame = frame.f_back
        return sum(sizes.values())

    def end(self) -> None:
        """Raise ``SampleEnded`` in the run, on the thread that made it.

        Raises ``SwallowedEnd`` if the run goes on, and what its own clean-up raises.
        """
        if not self._greenlet or self.ended:
            return
        state = thread_state(self._device_type)
        try:
            # What the throw returns, if the run goes on, holds the run's tensors.
            self._greenlet.throw(SampleEnded)
        except SampleEnded:
            return
        finally:
            restore(state, self._device_type)
        raise SwallowedEnd("a pipeline caught its end and went on")

    def _switch(self, *values: Any) -> Any:
        state = thread_state(self._device_type)
        try:
            return self._greenlet.switch(*values)
        finally:
            restore(state, self._device_type)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in ``value`` and in the lists, tuples and dicts that it consists of."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
