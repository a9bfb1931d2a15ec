"""How long an engine process may take to load its models."""

LOAD_FACTOR = 4.0
"""An engine may load again for that multiple of its last load: the machine may be busier now."""

SHORTEST_LOAD_SECONDS = 60.0
"""The least time that an engine gets to load."""


class LoadLimit:
    """How long an engine may load, in ``seconds``: ``longest`` at first, then learned.

    A limit that was too short doubles, up to ``longest``.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = self.longest = longest

    def loaded(self, seconds: float) -> None:
        """A load took ``seconds``."""
        learned = max(LOAD_FACTOR * seconds, SHORTEST_LOAD_SECONDS)
        self.seconds = min(learned, self.longest)

    def timed_out(self) -> None:
        """A load reached the limit."""
        self.seconds = min(2 * self.seconds, self.longest)
