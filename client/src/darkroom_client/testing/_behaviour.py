"""How the fake server treats a request."""

import threading
from dataclasses import dataclass

from darkroom_client._errors import DarkroomError
from darkroom_client.testing._statuses import sent_as


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What happens to one request; by default it is drawn at once.

    ``error``: what its caller gets, refused before it is accepted, or after ``error_at_step``
    steps. A refusal that is ``Unavailable`` meets the client's retries: script one for each try.
    ``queue``: jobs before it, told one by one. ``step_seconds``: what each of those and each step
    takes. ``hold``: the first step waits until this event is set.

    ``drop_at_step``: the connection breaks after that step, and the job goes on.
    ``crash_at_step``: the engine dies after that step, once, and the job is run again.
    ``forget_at_step``: as if the server were replaced by a new one after that step.
    ``withheld``: the safety checker keeps the pixels back. ``prompt_truncated``: the prompt was
    too long.

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
