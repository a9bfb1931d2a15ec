"""How long an engine takes for one more job: estimated cheaply, to compare engines."""

from collections.abc import Callable, Iterable

from darkroom_server.dispatch.estimation.batch_times import BatchTimeModel, Group
from darkroom_server.dispatch.estimation.remaining_work import RemainingWork


def finish_seconds(
    new: RemainingWork,
    jobs: Iterable[RemainingWork],
    batch_times: BatchTimeModel,
    max_rows: Callable[[Group], int],
) -> float:
    """About when an engine with ``jobs`` would finish ``new``, in seconds from now.

    As if its images shared the engine equally (processor sharing): until ``new`` is finished, each
    other image takes as many calls as it has left, and at most as many as ``new``. Batches are as
    wide as that makes them on average. Images that end by then are decoded. ``batch_times`` and
    ``max_rows`` are as in ``Load``.
    """
    calls = max(new.calls, default=1)
    group, sums = new.group, [0, 0]
    by_group = {group: sums}
    for each in (new, *jobs):
        if each.group != group:
            group = each.group
            sums = by_group.setdefault(group, [0, 0])
        own_rows = each.key.rows
        for remaining in each.calls:
            if remaining > calls:
                sums[0] += calls * own_rows
            else:
                sums[0] += remaining * own_rows
                sums[1] += 1
    seconds = 0.0
    for group, (row_calls, decodes) in by_group.items():
        if row_calls:
            rows = min(row_calls / calls, max_rows(group))
            seconds += row_calls / rows * batch_times.batch_seconds(group, rows)
            seconds += decodes * batch_times.decode_seconds(group)
    return seconds
