"""The noise schedulers of one model with the timesteps of a run."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from darkroom_server.core.job import SchedulerName
from darkroom_server.engine.components.schedulers import make_scheduler
from darkroom_server.engine.stepping.linear_steps import LinearSteps, read_steps
from darkroom_server.engine.stepping.step_tables import MOST_TABLES


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler with its timesteps on the CPU, and its steps, None if they are not linear."""

    scheduler: Any
    linear: LinearSteps | None


class Schedules:
    """Makes schedulers on a model's scheduler ``config``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._shared: OrderedDict[tuple[SchedulerName, int], Schedule] = OrderedDict()

    def new(self, name: SchedulerName, steps: int) -> Any:
        """A scheduler for one sample, which takes its own steps."""
        scheduler = make_scheduler(name, self._config)
        # On the CPU: reading a timestep must not wait for the device.
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    def shared(self, name: SchedulerName, steps: int) -> Schedule:
        """The schedule of all samples with these settings; none of them may step its scheduler."""
        key = (name, steps)
        if key not in self._shared:
            scheduler = self.new(name, steps)
            self._shared[key] = Schedule(scheduler, read_steps(scheduler))
            if len(self._shared) > MOST_TABLES:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key]
