"""Invalid arguments: the error names each, and nothing is sent."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from darkroom_client import GenerationRequest, InvalidRequest
from darkroom_client.testing import FakeServer

SECONDS = [math.inf, -math.inf, math.nan, 0, -1, 1e10]


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_timeout_out_of_range_is_an_error(caller: Any, fake: FakeServer, seconds: float) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: caller.generate("a star", timeout=seconds),
        lambda: caller.generate_many(["a star"], timeout=seconds),
        lambda: caller.stream("a star", timeout=seconds),
        lambda: caller.watch("r-1", timeout=seconds),
        lambda: caller.submit("a star", timeout=seconds),
        lambda: caller.cancel("r-1", timeout=seconds),
        lambda: caller.estimate("a star", timeout=seconds),
        lambda: caller.models(timeout=seconds),
        lambda: caller.model(timeout=seconds),
        lambda: caller.status(timeout=seconds),
        lambda: caller.wait_until_ready(timeout=seconds),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"timeout is .*, must be above 0 and at most"):
            call()
    with pytest.raises(ValueError, match=r"time_limit is .*, must be above 0 and at most"):
        caller.submit("a star", time_limit=seconds)

    assert fake.jobs == ()


def test_a_timeout_must_be_a_number(caller: Any, fake: FakeServer) -> None:
    for wrong in ("5", True, [1.0]):
        with pytest.raises(TypeError, match=r"timeout is .*, must be a number"):
            caller.generate("a star", timeout=wrong)
        with pytest.raises(TypeError, match=r"time_limit is .*, must be a number"):
            caller.submit("a star", time_limit=wrong)

    assert fake.jobs == ()


def test_a_long_timeout_is_accepted(caller: Any) -> None:
    assert caller.generate("a star", timeout=1e9).images


@pytest.mark.parametrize("prompt", [None, 5, b"a star", ["a star"]])
def test_a_prompt_must_be_text(caller: Any, fake: FakeServer, prompt: Any) -> None:
    words = r"prompt is .*, must be a str"
    for verb in (caller.generate, caller.stream, caller.submit, caller.estimate):
        with pytest.raises(TypeError, match=words):
            verb(prompt)
    for wrong in (prompt, GenerationRequest(prompt=prompt)):
        with pytest.raises(TypeError, match=words):
            caller.generate_many([wrong])

    assert fake.jobs == ()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("negative_prompt", None, "must be a str"),
        ("model", 3, "must be a str"),
        ("request_id", 5, "must be a str"),
        ("steps", "20", "must be an integer"),
        ("width", 64.0, "must be an integer"),
        ("seed", True, "must be an integer"),
        ("guidance_scale", "7", "must be a number"),
        ("exact", "yes", "must be True or False"),
        ("true_cfg_scale", "4", "must be a number"),
        ("guidance_rescale", True, "must be a number"),
        ("max_sequence_length", 77.0, "must be an integer"),
        ("prompt_2", None, "must be a str"),
        ("negative_prompt_3", 3, "must be a str"),
        ("empty_negative_prompt", 1, "must be True or False"),
    ],
)
def test_the_error_names_a_field_of_the_wrong_type(
    caller: Any, fake: FakeServer, field: str, value: object, words: str
) -> None:
    with pytest.raises(TypeError, match=f"{field} is .*, {words}"):
        caller.generate("a star", **{field: value})

    assert fake.jobs == ()


@pytest.mark.parametrize("field", ["guidance_scale", "true_cfg_scale", "guidance_rescale"])
@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e39])
def test_a_scale_that_is_not_finite_is_a_violation(
    caller: Any, fake: FakeServer, field: str, scale: float
) -> None:
    with pytest.raises(InvalidRequest, match="not a finite 32-bit number") as caught:
        caller.generate("a star", **{field: scale})

    assert [violation.field for violation in caught.value.violations] == [field]
    assert fake.jobs == ()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt_syntax", "compel", "is 'compel', must be one of plain, weighted"),
        ("max_sequence_length", 2**31, "out of range for 32 bits"),
        ("prompt_2", "\udc80", "is not valid Unicode text"),
        ("negative_prompt_3", "\udc80", "is not valid Unicode text"),
    ],
)
def test_a_value_that_the_message_cannot_hold_is_a_violation(
    caller: Any, fake: FakeServer, field: str, value: object, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        caller.generate("a star", **{field: value})

    assert [violation.field for violation in caught.value.violations] == [field]
    assert fake.jobs == ()


@pytest.mark.parametrize("requests", ["a star", GenerationRequest(prompt="a star")])
def test_one_request_in_place_of_many_is_an_error(
    caller: Any, fake: FakeServer, requests: Any
) -> None:
    for verb in (caller.generate_many, caller.generate_as_completed):
        with pytest.raises(TypeError, match="put it in a list"):
            verb(requests)

    assert fake.jobs == ()


def test_names_must_be_text(caller: Any) -> None:
    for name in (None, 5):
        with pytest.raises(TypeError, match="request_id"):
            caller.watch(name)
        with pytest.raises(TypeError, match="request_id"):
            caller.cancel(name)
        with pytest.raises(TypeError, match="id is"):
            caller.model(name)
    with pytest.raises(ValueError, match="not valid Unicode"):
        caller.cancel("\udc80")


@pytest.mark.parametrize("every", [1.5, "2", True])
def test_preview_every_must_be_an_integer(caller: Any, every: Any) -> None:
    with pytest.raises(TypeError, match="preview_every"):
        caller.stream("a star", preview_every=every)


def test_preview_every_has_a_bound(caller: Any) -> None:
    with pytest.raises(ValueError, match="preview_every"):
        caller.stream("a star", preview_every=2**31)


def test_an_unknown_preview_format_is_an_error(caller: Any) -> None:
    with pytest.raises(ValueError, match="preview_format is 'bmp', must be one of png, jpeg"):
        caller.stream("a star", preview_every=5, preview_format="bmp")
    with pytest.raises(TypeError, match="preview_format is 5, must be a str"):
        caller.stream("a star", preview_format=5)
