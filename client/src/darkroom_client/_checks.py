"""Checks of arguments before anything is sent; the errors name the argument."""

import operator
from numbers import Real
from typing import SupportsIndex

LONGEST_SECONDS = 1e9
"""About thirty years. gRPC uses integers: a much larger timeout overflows into the past."""


def check_seconds(name: str, value: float | None) -> float | None:
    """Return a number of seconds, or None; raises ``ValueError`` if it is out of range."""
    if value is None:
        return None
    check_number(name, value)
    if not 0 < value <= LONGEST_SECONDS:
        raise ValueError(
            f"{name} is {value}, must be above 0 and at most {LONGEST_SECONDS:g} seconds"
        )
    return float(value)


def check_number(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {_shown(value)}, must be a number")


def check_integer(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is an integer, of Python or of another library."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} is {_shown(value)}, must be an integer")
    operator.index(value)


def check_text(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}, must be a str")


def check_flags(**values: object) -> None:
    """Raise ``TypeError`` unless every value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {_shown(value)}, must be True or False")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be sent: lone surrogates, as in some command-line arguments, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
