"""Who makes the call that is being handled."""

from contextvars import ContextVar

from darkroom_server.core.caller import ANONYMOUS, Caller

_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """The caller of the call that this task handles."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Note who makes the call, for the rest of this task."""
    _current.set(caller)
