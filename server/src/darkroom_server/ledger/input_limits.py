"""How much the pictures of jobs may take in a ledger, and which ended jobs make room for them."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from darkroom_server.core.ledger import Draft
from darkroom_server.ledger.rules import inputs_do_not_fit, too_many_inputs


@dataclass(frozen=True, slots=True)
class InputLimits:
    """The most bytes of pictures: of all jobs ``together``, and of the jobs ``of_caller``."""

    together: int = sys.maxsize
    of_caller: int = sys.maxsize


NO_LIMITS = InputLimits()


class Named(NamedTuple):
    """A job that has not been forgotten, and one of the files that it names."""

    job: Any
    counted_as: str
    ended: bool
    digest: str
    size: int


def evicted(draft: Draft, named: Sequence[Named], limits: InputLimits) -> list[Any]:
    """The ended jobs to forget, so that the pictures of ``draft`` fit into ``limits``.

    A file counts once, however many jobs name it. ``named``: of all jobs, those that ended in the
    order of their ends. Raises ``QuotaExceeded`` or ``QueueFull`` if the pictures do not fit beside
    those of jobs that have not ended.
    """
    own = [each for each in named if each.counted_as == draft.counted_as]
    needed = _bytes(draft, [each for each in own if not each.ended])
    if needed > limits.of_caller:
        raise too_many_inputs(draft, needed, limits.of_caller)
    if _bytes(draft, [each for each in named if not each.ended]) > limits.together:
        held = sum({each.digest: each.size for each in named}.values())
        raise inputs_do_not_fit(held, _bytes(draft, named) - held, limits.together)
    jobs = set(_oldest(draft, own, limits.of_caller))
    remaining = [each for each in named if each.job not in jobs]
    return [*jobs, *_oldest(draft, remaining, limits.together)]


def _bytes(draft: Draft, named: Sequence[Named]) -> int:
    """The bytes of the files that are ``named``, and of those of ``draft``."""
    sizes = {each.digest: each.size for each in named}
    return sum((sizes | {digest: len(data) for digest, data in draft.inputs.items()}).values())


def _oldest(draft: Draft, named: Sequence[Named], most: int) -> Iterator[Any]:
    """The oldest ended jobs, until what remains has at most ``most`` bytes with ``draft``."""
    total = _bytes(draft, named)
    names = Counter(each.digest for each in named)
    names.update(draft.inputs.keys())
    files: defaultdict[Any, list[Named]] = defaultdict(list)
    for each in named:
        if each.ended:
            files[each.job].append(each)
    for job, its in files.items():
        if total <= most:
            return
        yield job
        for each in its:
            names[each.digest] -= 1
            total -= 0 if names[each.digest] else each.size
