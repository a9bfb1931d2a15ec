"""The exit codes of the commands, split by what a script can do about them."""

from darkroom_client import _errors as errors
from darkroom_client._errors import DarkroomError

DIFFERENT = 1
USAGE = 2
LATER = 3
DEADLINE = 4
FORBIDDEN = 5
TOO_LARGE = 6
FAILED = 7
FILE = 8
NEARLY_SAME = 9
INTERRUPTED = 130
PIPE = 141

TABLE = """\
exit codes:
  0    done
  1    replay: the image is different
  2    the command line or the request is wrong, or the model or request id is unknown
  3    try again later: the server is down, loading, overloaded, or the quota is used up
  4    the deadline passed
  5    the server requires a token, or does not allow this
  6    too large for the server's memory or for one reply
  7    the server failed, withheld the image, or is of another version
  8    a file is missing, exists already or cannot be written
  9    replay: the image is nearly the same (40 dB or more), but not identical
  130  interrupted
  141  the reader of the output closed it
With several prompts, it is the code of the first prompt that failed.
"""

_CODES: dict[type[DarkroomError], int] = {
    errors.InvalidRequest: USAGE,
    errors.UploadNotFound: USAGE,
    errors.ModelNotFound: USAGE,
    errors.ModelUnusable: USAGE,
    errors.ModelDoesNotFit: TOO_LARGE,
    errors.AdapterNotFound: USAGE,
    errors.AdapterUnusable: USAGE,
    errors.UnknownRequest: USAGE,
    errors.Unavailable: LATER,
    errors.TLSError: USAGE,
    errors.Overloaded: LATER,
    errors.QuotaExceeded: LATER,
    errors.DeadlineExceeded: DEADLINE,
    errors.DeadlineUnreachable: DEADLINE,
    errors.Unauthenticated: FORBIDDEN,
    errors.PermissionDenied: FORBIDDEN,
    errors.TooLarge: TOO_LARGE,
    errors.ReplyTooLarge: TOO_LARGE,
    errors.GenerationFailed: FAILED,
    errors.ImageWithheld: FAILED,
    errors.Cancelled: FAILED,
    errors.Unsupported: FAILED,
    errors.ServerError: FAILED,
    errors.DarkroomError: FAILED,
}


def exit_code(error: DarkroomError) -> int:
    """The exit code for ``error``."""
    return _CODES[type(error)]
