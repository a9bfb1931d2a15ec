"""How far forecasts were off of late, and so by how much the next one should be corrected."""

import math
from collections import Counter, defaultdict

LEARNING = 0.05
"""What a finished job changes of the correction, as a part of its own difference."""

DOUBTS = 5
"""A correction begins as if so many forecasts had come true exactly."""

REFUSALS = 200
"""So many refusals in a row, and nothing finished, and half of what was learnt is forgotten."""

LARGEST = 2.0
"""In natural logarithms: a forecast that was off by more is believed to be off by this."""

LONGER = 2.0
"""A job that expired is believed to have wanted so many times what it had: nobody saw its end."""

SHORTEST, LONGEST = -3, 8
"""Classes of forecasts, by their power of two: an eighth of a second, and four minutes."""


class Calibration:
    """The usual factor between what a forecast said and what came true, by the forecast's length.

    A forecast knows who is there, not who comes: the longer a job takes, the more others come
    meanwhile, overtake it and widen its passes. Nor does it know what passes between two passes.

    What makes forecasts longer may keep all jobs of a length out, and then nothing more is learnt
    of them. So it fades with refusals, until some are let in and show what is true.
    """

    def __init__(self) -> None:
        self._corrections: defaultdict[int, float] = defaultdict(float)
        self._learned: defaultdict[int, int] = defaultdict(int)
        self._refused: Counter[int] = Counter()

    def factor(self, seconds: float) -> float:
        """What a forecast of so many seconds is to be multiplied by."""
        return math.exp(self._corrections.get(_class_of(seconds), 0.0))

    def learn(self, seconds: float, real: float) -> None:
        """A job that was forecast to take ``seconds`` took ``real`` ones."""
        if not (seconds > 0.0 and real > 0.0):
            return
        which = _class_of(seconds)
        del self._refused[which]
        self._learned[which] += 1
        part = max(LEARNING, 1 / (self._learned[which] + DOUBTS))
        off = math.log(min(max(real / seconds, math.exp(-LARGEST)), math.exp(LARGEST)))
        self._corrections[which] += part * (off - self._corrections[which])

    def expired(self, seconds: float, had: float) -> None:
        """A job that was forecast to take ``seconds`` was not finished in the ``had`` it had.

        Else only those that others did not get before would be learnt from.
        """
        if had > seconds:
            self.learn(seconds, LONGER * had)

    def refused(self, seconds: float) -> None:
        """A job that was forecast to take ``seconds`` was not let in, because that is too long."""
        which = _class_of(seconds)
        if self._corrections.get(which, 0.0) <= 0.0:
            return
        self._refused[which] += 1
        if self._refused[which] == REFUSALS:
            del self._refused[which]
            self._corrections[which] /= 2
            self._learned[which] //= 2


def _class_of(seconds: float) -> int:
    return min(max(math.floor(math.log2(min(max(seconds, 1e-9), 1e9))), SHORTEST), LONGEST)
