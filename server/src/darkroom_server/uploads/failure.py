"""Why a picture was not decoded."""

from enum import StrEnum


class DecodeFailure(StrEnum):
    """Why a picture was not decoded; the last two are found outside of the worker."""

    NOT_A_PICTURE = "not_a_picture"
    TOO_MANY_PIXELS = "too_many_pixels"
    WRONG_SIZE = "wrong_size"
    DAMAGED = "damaged"
    TOO_MUCH_MEMORY = "too_much_memory"
    TOO_SLOW = "too_slow"
    WORKER_DIED = "worker_died"
