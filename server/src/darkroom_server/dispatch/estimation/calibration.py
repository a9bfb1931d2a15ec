"""Corrects estimates by how wrong recent ones were."""

import math
from collections import Counter, defaultdict

LEARNING = 0.05
"""EWMA weight of one finished job."""

PRIOR_WEIGHT = 5
"""A correction starts as if this many estimates had been exact."""

REJECTIONS = 200
"""After this many rejections without a finished job, the correction is halved."""

LARGEST = 2.0
"""In natural logarithms: the largest error that one job can contribute."""

EXPIRED_FACTOR = 2.0
"""An expired job counts as if it had needed this multiple of its time: its end is unknown."""

SHORTEST, LONGEST = -3, 8
"""Classes of estimates by power of two seconds: from an eighth of a second to four minutes."""


class Calibration:
    """The typical factor between simulated and actual seconds, by the class of the estimate.

    A simulation knows the jobs that are here, not those that arrive later: the longer a job takes,
    the more jobs arrive meanwhile, overtake it and widen its batches. Nor does it know the time
    between two batches.

    A correction that lengthens estimates can reject every job of a class, and then nothing more is
    learned of that class. So it fades with rejections until some jobs are accepted again.
    """

    def __init__(self) -> None:
        self._corrections: defaultdict[int, float] = defaultdict(float)
        self._learned: defaultdict[int, int] = defaultdict(int)
        self._rejected: Counter[int] = Counter()

    def factor(self, seconds: float) -> float:
        """The factor for an estimate of ``seconds``."""
        return math.exp(self._corrections.get(_class_of(seconds), 0.0))

    def learn(self, seconds: float, real: float) -> None:
        """Learn from a job that was simulated to take ``seconds`` and took ``real`` seconds."""
        if not (seconds > 0.0 and real > 0.0):
            return
        length = _class_of(seconds)
        del self._rejected[length]
        self._learned[length] += 1
        part = max(LEARNING, 1 / (self._learned[length] + PRIOR_WEIGHT))
        off = math.log(min(max(real / seconds, math.exp(-LARGEST)), math.exp(LARGEST)))
        self._corrections[length] += part * (off - self._corrections[length])

    def expired(self, seconds: float, had: float) -> None:
        """Learn from a job, simulated to take ``seconds``, that was not finished within ``had``.

        Without this, only jobs that were not overtaken are learned from (survivorship bias).
        """
        if had > seconds:
            self.learn(seconds, EXPIRED_FACTOR * had)

    def rejected(self, seconds: float) -> None:
        """A job, simulated to take ``seconds``, was rejected because that is too long."""
        length = _class_of(seconds)
        if self._corrections.get(length, 0.0) <= 0.0:
            return
        self._rejected[length] += 1
        if self._rejected[length] == REJECTIONS:
            del self._rejected[length]
            self._corrections[length] /= 2
            self._learned[length] //= 2


def _class_of(seconds: float) -> int:
    return min(max(math.floor(math.log2(min(max(seconds, 1e-9), 1e9))), SHORTEST), LONGEST)
