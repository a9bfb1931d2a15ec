"""The channel pairs for calls that last as long as a job, with a limit of calls for each pair."""

CALLS_PER_PAIR = 90
"""A server limits the streams of a connection to about 100. The health check of the checked channel
is one of them."""


class CallCount:
    """The calls that are open on one pair of channels.

    Each step is one atomic operation of a set, so gRPC's threads may release calls without a lock.
    """

    def __init__(self) -> None:
        self._open: set[object] = set()

    @property
    def full(self) -> bool:
        """Whether a further call belongs on another pair."""
        return len(self._open) >= CALLS_PER_PAIR

    def add(self) -> object:
        """Count a call; returns what ``release`` takes."""
        place = object()
        self._open.add(place)
        return place

    def release(self, place: object) -> None:
        """The call has ended. Idempotent."""
        self._open.discard(place)
