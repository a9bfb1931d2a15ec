"""What every ledger rejects and in which words, and how it stores a failure."""

import json
from dataclasses import asdict

from darkroom_server.core.errors import Failure, QueueFull, QuotaExceeded, Reason, Violation
from darkroom_server.core.ledger import Draft

INPUT_RETRY_SECONDS = 1.0
QUEUE_RETRY_SECONDS = 1.0

LATE = Failure(Reason.DEADLINE_EXPIRED, "the deadline passed before it was begun")
"""Why a queued job ends whose deadline has passed."""

EXPIRED_AT_ONCE = 500
"""The most jobs that one statement ends, so that it does not hold up the others."""


def too_many_jobs(draft: Draft, live: int) -> QuotaExceeded:
    """The caller has as many jobs as it may."""
    return QuotaExceeded(
        f"caller:{draft.counted_as}",
        f"{live} jobs of {draft.counted_as!r} are in the ledger, and {draft.max_live} may be at "
        "once; wait until one has ended",
    )


def queue_is_full(queued: int) -> QueueFull:
    """As many jobs wait as may."""
    return QueueFull(
        f"{queued} jobs wait in the ledger, and no more are taken", QUEUE_RETRY_SECONDS
    )


def inputs_do_not_fit(held: int, new: int, most: int) -> QueueFull:
    """The pictures of accepted jobs take as much as they may."""
    return QueueFull(
        f"the images of accepted jobs take {held} bytes in the ledger, of {most} that they may, "
        f"and those of this request {new} more",
        INPUT_RETRY_SECONDS,
    )


def too_many_inputs(draft: Draft, needed: int, most: int) -> QuotaExceeded:
    """The pictures of the caller's unfinished jobs and of ``draft`` have ``needed`` bytes."""
    own = sum(map(len, draft.inputs.values()))
    if own > most:
        return QuotaExceeded(
            f"caller:{draft.counted_as}",
            f"the images of this request have {own} bytes, and the ledger keeps {most} for one "
            "caller; send fewer or smaller ones",
        )
    return QuotaExceeded(
        f"caller:{draft.counted_as}",
        f"the images of unfinished jobs of {draft.counted_as!r} would have {needed} bytes in the "
        f"ledger with those of this request, and {most} are kept for one caller; wait until a job "
        "has ended, or send fewer or smaller ones (a file that several jobs share counts once)",
    )


def failure_text(failure: Failure | None) -> str | None:
    """``failure`` as JSON."""
    return None if failure is None else json.dumps(asdict(failure))


def failure_of(text: str | None) -> Failure | None:
    """What ``failure_text`` made the text of; a reason of a later version is INTERNAL."""
    if text is None:
        return None
    fields = json.loads(text)
    known = fields["reason"] in Reason.__members__
    return Failure(
        reason=Reason[fields["reason"]] if known else Reason.INTERNAL,
        message=fields["message"],
        metadata=fields["metadata"],
        violations=tuple(Violation(**each) for each in fields["violations"]),
    )
