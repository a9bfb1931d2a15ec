"""What torch's exceptions mean, and the failures that callers see."""

from typing import Any

import torch

from darkroom_server.core.errors import Failure, Reason, Violation
from darkroom_server.core.exhaustion import is_exhaustion
from darkroom_server.core.job import PROMPT_FIELDS, Job
from darkroom_server.core.prompt_syntax import PromptTooLong

_ALLOCATION = (
    "not enough memory",
    "can't allocate memory",
    "alloc_cpu",
    # Also in what a compiled denoiser raises, which is a RuntimeError.
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # A convolution without memory for its workspace.
    "unable to find an engine to execute",
)

_LOST_DEVICE = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_EXECUTION_FAILED")

# Before torch 2.8 this type does not exist, and only the text identifies the error.
_DEVICE_ERROR: Any = getattr(torch, "AcceleratorError", ())


class ImageNotEncoded(RuntimeError):
    """The VAE failed to encode an input image."""


def is_out_of_memory(error: Exception) -> bool:
    """True if an allocation failed.

    Only torch's GPU allocator has an exception type for that. On a CPU, and if CUDA or one of its
    libraries allocates, it is a RuntimeError that only its text identifies.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _ALLOCATION)


def is_fatal(error: Exception) -> bool:
    """True if the device is lost: every later call would fail too, so the engine must end."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False  # CUDA's own errors are RuntimeErrors; other errors may quote a caller's text.
    return isinstance(error, _DEVICE_ERROR) or any(text in str(error) for text in _LOST_DEVICE)


def one_line(error: Exception) -> str:
    """The first line of what ``error`` says, for a line of the operator's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def prompt_too_long(error: PromptTooLong, job: Job) -> Failure:
    """The failure of ``job``, one of whose prompts is too long."""
    field = next((name for name in PROMPT_FIELDS if getattr(job, name) == error.text), "prompt")
    return Failure(
        Reason.INVALID_REQUEST, f"{field}: {error}", violations=(Violation(field, str(error)),)
    )


def adapter_unusable(id: str, error: Exception) -> Failure:
    """The failure of the jobs with the adapter ``id``, whose file cannot be used any more."""
    cause = error.__cause__
    if is_exhaustion(error) or (isinstance(cause, Exception) and is_out_of_memory(cause)):
        return Failure(
            Reason.ENGINE_FAILED, f"adapter {id!r} could not be read now, try again later"
        )
    # Without the file's path, which is the operator's.
    why = error.strerror if isinstance(error, OSError) else ""
    return Failure(
        Reason.ADAPTER_UNUSABLE,
        f"adapter {id!r} cannot be used any more: {why or one_line(error)}",
    )


OUT_OF_MEMORY = Failure(
    Reason.OUT_OF_MEMORY,
    "this image does not fit in the device's memory, even alone; request a smaller size",
)
NON_FINITE = Failure(
    Reason.NON_FINITE,
    "the model produced values that are not numbers for this image, in full precision too; "
    "try another seed, scheduler or lower guidance",
)
DENOISER_FAILED = Failure(Reason.ENGINE_FAILED, "the denoiser failed on this image")
SCHEDULER_FAILED = Failure(
    Reason.SCHEDULER_FAILED,
    "the scheduler failed on this image; try another scheduler or number of steps",
)
PROMPT_OUT_OF_MEMORY = Failure(
    Reason.OUT_OF_MEMORY,
    "the device's memory is too full to encode this prompt, even alone; try again later",
)
PROMPT_FAILED = Failure(Reason.ENGINE_FAILED, "the prompt could not be encoded")
INPUT_FAILED = Failure(Reason.ENGINE_FAILED, "the input image could not be encoded")
DECODE_FAILED = Failure(Reason.ENGINE_FAILED, "the image could not be decoded")
ENCODE_FAILED = Failure(Reason.ENGINE_FAILED, "the image could not be encoded in its format")
