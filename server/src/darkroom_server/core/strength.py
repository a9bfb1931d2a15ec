"""How many steps an image takes that starts from another one."""

from enum import StrEnum


class StrengthRounding(StrEnum):
    """What a family's pipelines round down in their ``get_timesteps`` if ``strength`` is set.

    TAKEN: the steps that an image takes. SKIPPED: the first steps, which it does not take.
    """

    TAKEN = "taken"
    SKIPPED = "skipped"

    def steps_taken(self, steps: int, strength: float) -> int:
        """The steps of ``steps`` that an image takes which starts from another one."""
        # The operations of diffusers in their order: another order rounds otherwise.
        if self is StrengthRounding.TAKEN:
            return min(int(steps * strength), steps)
        return steps - int(max(steps - min(steps * strength, steps), 0))
