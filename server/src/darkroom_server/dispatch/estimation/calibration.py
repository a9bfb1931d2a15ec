"""Corrects estimates by how wrong recent ones were."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

WINDOW = 64
"""Finished jobs that a correction is learned from; older ones are forgotten."""

PRIOR_WEIGHT = 5
"""A correction starts as if this many estimates had been exact."""

LARGEST_INFLUENCE = 0.5
"""In natural logarithms: a job farther from the median counts as if it was that far from it."""

OPTIMISTIC = 0.1
"""The share of recent jobs or batches that went better than the optimistic figure."""

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

    The factor is a robust mean of the last ``WINDOW`` jobs (a Huber M-estimate), so that one slow
    stretch hardly moves it. The optimistic factor is a low quantile of the same jobs.

    A factor that lengthens estimates can reject every job of a class, and then nothing more is
    learned of that class. So it fades with rejections until some jobs are accepted again.
    """

    def __init__(self) -> None:
        self._errors: defaultdict[int, deque[float]] = defaultdict(
            lambda: deque([0.0] * PRIOR_WEIGHT, maxlen=WINDOW)
        )
        self._rejected: Counter[int] = Counter()

    def factor(self, seconds: float) -> float:
        """The factor for an estimate of ``seconds``."""
        return math.exp(_robust_mean(self._errors[_class_of(seconds)]))

    def optimistic_factor(self, seconds: float) -> float:
        """The same if the job goes as well as the best of the recent ones; never above it."""
        errors = self._errors[_class_of(seconds)]
        return math.exp(min(quantile(errors, OPTIMISTIC), _robust_mean(errors)))

    def learn(self, seconds: float, real: float) -> None:
        """Learn from a job that was simulated to take ``seconds`` and took ``real`` seconds."""
        if not (seconds > 0.0 and real > 0.0):
            return
        length = _class_of(seconds)
        del self._rejected[length]
        off = math.log(min(max(real / seconds, math.exp(-LARGEST)), math.exp(LARGEST)))
        self._errors[length].append(off)

    def expired(self, seconds: float, had: float) -> None:
        """Learn from a job, simulated to take ``seconds``, that was not finished within ``had``.

        Without this, only jobs that were not overtaken are learned from (survivorship bias).
        """
        if had > seconds:
            self.learn(seconds, EXPIRED_FACTOR * had)

    def rejected(self, seconds: float) -> None:
        """A job, simulated to take ``seconds``, was rejected because that is too long."""
        length = _class_of(seconds)
        errors = self._errors[length]
        if _robust_mean(errors) <= 0.0:
            return
        self._rejected[length] += 1
        if self._rejected[length] == REJECTIONS:
            del self._rejected[length]
            self._errors[length] = deque((each / 2 for each in errors), maxlen=WINDOW)


def quantile(values: Sequence[float], share: float) -> float:
    """The value of which ``share`` of ``values``, not empty, are below it."""
    return sorted(values)[int(share * len(values))]


def _robust_mean(values: Sequence[float]) -> float:
    median = quantile(values, 0.5)
    low, high = median - LARGEST_INFLUENCE, median + LARGEST_INFLUENCE
    return sum(min(max(each, low), high) for each in values) / len(values)


def _class_of(seconds: float) -> int:
    return min(max(math.floor(math.log2(min(max(seconds, 1e-9), 1e9))), SHORTEST), LONGEST)
