"""How the fake server handles a request."""

import threading
from dataclasses import dataclass, fields

from darkroom_client._errors import DarkroomError
from darkroom_client.testing._statuses import sent_as


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Behaviour:
    """What happens to one request; by default it finishes at once.

    ``error``: the error that its caller gets: instead of the acceptance, or after
    ``error_at_step`` steps. The client retries after
    ``Unavailable`` until its timeout: script one for each try, or use ``Retry(attempts=1)``.
    ``queue``: the number of jobs before it; each emits one event. ``step_seconds``: the duration of
    each of those and of each step. ``hold``: the first step waits until this event is set.

    ``drop_at_step``: the connection breaks after that step, and the job continues.
    ``crash_at_step``: the engine crashes after that step, once, and the job runs again.
    ``forget_at_step``: after that step the server forgets the job, like a new server.
    ``withheld``: the safety checker withholds the pixels. ``prompt_truncated``: the prompt was too
    long.

    Raises ``TypeError`` for an error that no server sends.
    """

    error: DarkroomError | None = None
    error_at_step: int = 0
    queue: int = 0
    step_seconds: float = 0.0
    hold: threading.Event | None = None
    drop_at_step: int | None = None
    crash_at_step: int | None = None
    forget_at_step: int | None = None
    withheld: bool = False
    prompt_truncated: bool = False

    def __post_init__(self) -> None:
        if self.error is not None:
            sent_as(self.error)

    def __repr__(self) -> str:
        values = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        changed = ", ".join(f"{name}={value!r}" for name, value, unset in values if value != unset)
        return f"Behaviour({changed})"
